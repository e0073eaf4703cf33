"""The page in a browser: what a newcomer does, at the width of a desk and of a phone.

Screenshots are left in out/screenshots, which git ignores.
"""

from __future__ import annotations

import re
import shutil
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attnswap.demo.site import Site
from attnswap.pipelines import save
from attnswap.pipelines.job import Job
from attnswap.pipelines.session import Session

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
PATIENCE = 60_000  # ms
expect.set_options(timeout=PATIENCE)

SCREENSHOTS = Path(__file__).parents[2] / "out" / "screenshots"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page is not tested in a browser: no Chromium here")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, server: tuple[str, Site]) -> Iterator[Callable[..., Any]]:
    """Opens the page as a visitor of its own; in the end, nothing was asked of another machine, and nothing broke."""
    url, asked, broken, contexts = server[0], [], [], []

    def open_page(size: dict[str, int] = DESK, **how: Any) -> Any:
        context = browser.new_context(viewport=size, reduced_motion="reduce", **how)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(url)
        expect(page.locator("#image-go")).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        context.close()
    hosts = {urllib.parse.urlsplit(each).hostname for each in asked if each.startswith(("http", "ws"))}
    assert hosts == {"127.0.0.1"}
    assert not broken


@pytest.fixture
def unhurried(server: tuple[str, Site]) -> Iterator[None]:
    """Steps that are slow on any machine, so that a click comes before the run's end."""
    shelf = server[1].shelf
    unet = shelf.session(shelf.offer("emoji-sd")).pipe.unet
    hook = unet.register_forward_pre_hook(lambda *_: time.sleep(0.25))
    yield
    hook.remove()


def shot(page: Any, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.evaluate("scrollTo(0, 0)")
    # The buttons stay in sight of the window, of which such a picture knows nothing.
    page.add_style_tag(content=".actions { position: static !important }")
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def fill(page: Any, field: str, value: str) -> None:
    """`field` is an elem_id."""
    box = page.locator(f"#{field} textarea, #{field} input").first
    box.fill(value)
    box.press("Tab")


def choose(page: Any, field: str, value: str) -> None:
    """An entry of a dropdown."""
    page.locator(f"#{field} input").first.click()
    page.locator(f"#{field}").get_by_role("option", name=value, exact=True).click()


def compare(page: Any, steps: int) -> None:
    """Begins to compare dense attention with HiDiffusion, at the 128 pixels that the page begins with."""
    tab(page, "Compare")
    fill(page, "compare-steps", str(steps))
    choose(page, "compare-method", "hidiffusion")
    page.locator("#compare-go").click()


def message(page: Any) -> Any:
    """What pops up."""
    return page.locator(".toast-body")


class TestANewcomer:
    def test_gets_a_picture_and_sees_what_was_accelerated(self, visit: Callable[..., Any]) -> None:
        page = visit()
        fill(page, "image-prompt", "a fox on a blue background")
        fill(page, "image-width", "128")
        fill(page, "image-height", "128")
        choose(page, "image-method", "hidiffusion")
        expect(page.locator("#image-estimate")).to_contain_text("1,024 tokens")
        page.locator("#image-go").click()
        expect(page.locator("#image-status")).to_contain_text("hidiffusion")
        with page.expect_download() as download:
            page.locator("#image-download").click()
        assert save.read_record(Path(download.value.path()))["methods"]["hidiffusion"]["windows"] == [2, 2]
        shot(page, "image-desk")
        tab(page, "Inside")
        expect(page.locator("#inside-summary")).to_contain_text("hidiffusion")
        expect(page.locator("#inside-phases img")).to_be_visible()
        shot(page, "inside-desk")

    @pytest.mark.usefixtures("unhurried")
    def test_sees_the_picture_come_about(self, visit: Callable[..., Any]) -> None:
        page = visit()
        page.locator("#image-go").click()
        page.wait_for_function(
            """() => {
              const shown = document.querySelector("#image-result img.preview");
              const seen = (window.seen ??= new Set());
              if (shown) seen.add(shown.src);
              return seen.size > 2;
            }"""
        )
        expect(page.locator("#image-status")).to_contain_text("left")
        shot(page, "running-desk")

    def test_gets_a_clip_that_plays(self, visit: Callable[..., Any]) -> None:
        page = visit()
        tab(page, "Video")
        fill(page, "video-steps", "3")
        choose(page, "video-method", "adaspa")
        page.locator("#video-go").click()
        expect(page.locator("#video-download")).to_be_enabled()
        expect(page.locator("#video-result video")).to_be_visible()
        page.wait_for_function("document.querySelector('#video-result video').readyState >= 2")
        shot(page, "video-desk")
        tab(page, "Inside")
        expect(page.locator("#inside-mask img")).to_be_visible()
        mask = page.locator("#inside-mask img").get_attribute("src")
        choose(page, "inside-head", "1")
        expect(page.locator("#inside-mask img")).not_to_have_attribute("src", mask)
        shot(page, "inside-adaspa-desk")

    def test_compares_with_dense_attention(self, visit: Callable[..., Any]) -> None:
        page = visit()
        compare(page, steps=4)
        expect(page.locator("#compare-slider img").first).to_be_visible()
        assert page.locator("#compare-slider img").count() == 2
        see_each_side_with_keys(page)
        expect(page.locator("#compare-table")).to_contain_text("PSNR")
        for chart in ("time", "memory", "density"):
            expect(page.locator(f"#compare-{chart} svg, #compare-{chart} canvas").first).to_be_visible()
        shot(page, "compare-desk")


def see_each_side_with_keys(page: Any) -> None:
    """By how much of the picture on the right is cut off on its left: nearly all or nothing, with what is beside it."""
    page.locator("#compare-whole input").first.focus()
    for least, most in ((85, 100), (0, 15)):
        page.keyboard.press("Tab")
        page.keyboard.press("Space")
        page.wait_for_function(
            """([least, most]) => [...document.querySelectorAll("#compare-slider img")].some((each) => {
              const cut = parseFloat(getComputedStyle(each).clipPath.split(" ").at(-1));
              return least <= cut && cut <= most;
            })""",
            arg=[least, most],
        )
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")


@pytest.mark.usefixtures("unhurried")
class TestStop:
    def test_of_a_comparison_keeps_what_was_finished(self, visit: Callable[..., Any]) -> None:
        page = visit()
        compare(page, steps=16)
        expect(page.locator("#compare-status")).to_contain_text("hidiffusion, 2 of 2", timeout=2 * PATIENCE)
        page.locator("#compare-stop").click()
        expect(page.locator("#compare-status")).to_contain_text(
            re.compile(r"Stopped after .*: dense attention is done, hidiffusion is not\.")
        )
        expect(page.locator("#compare-table")).to_contain_text("dense")

    def test_of_a_comparison_on_another_page_does_too(self, visit: Callable[..., Any]) -> None:
        page = visit()
        compare(page, steps=16)
        expect(page.locator("#compare-status")).to_contain_text("hidiffusion, 2 of 2", timeout=2 * PATIENCE)
        tab(page, "Image")
        page.locator("#image-stop").click()
        expect(page.locator("#image-status")).to_contain_text("Stopped after")
        tab(page, "Compare")
        expect(page.locator("#compare-status")).to_contain_text("dense attention is done, hidiffusion is not.")
        expect(page.locator("#compare-table")).to_contain_text("dense")

    def test_ends_the_run_and_the_next_one_begins_at_once(self, visit: Callable[..., Any]) -> None:
        page = visit()
        fill(page, "image-steps", "20")
        page.locator("#image-go").click()
        expect(page.locator("#image-status")).to_contain_text("step")
        page.locator("#image-stop").click()
        expect(page.locator("#image-status")).to_contain_text("Stopped after")
        fill(page, "image-steps", "1")
        page.locator("#image-go").click()
        expect(page.locator("#image-download")).to_be_enabled()
        expect(page.locator("#image-status")).not_to_contain_text("Stopped")

    def test_on_another_page_is_told_on_both(self, visit: Callable[..., Any]) -> None:
        page = visit()
        fill(page, "image-steps", "20")
        page.locator("#image-go").click()
        expect(page.locator("#image-status")).to_contain_text("step")
        tab(page, "Video")
        page.locator("#video-stop").click()
        expect(page.locator("#video-status")).to_contain_text("Stopped after")
        tab(page, "Image")
        expect(page.locator("#image-status")).to_contain_text("Stopped after")


@pytest.mark.usefixtures("unhurried")
def test_whoever_waits_sees_the_place_in_the_queue(visit: Callable[..., Any]) -> None:
    first, second = visit(), visit()
    fill(first, "image-steps", "20")
    first.locator("#image-go").click()
    expect(first.locator("#image-status")).to_contain_text("step")
    fill(second, "image-steps", "1")
    second.locator("#image-go").click()
    expect(second.locator("#image-result")).to_contain_text("queue: 1/1")
    first.locator("#image-stop").click()
    expect(first.locator("#image-status")).to_contain_text("Stopped after")
    expect(second.locator("#image-download")).to_be_enabled()


class TestHistory:
    def test_a_click_brings_all_settings_back(self, visit: Callable[..., Any]) -> None:
        page = visit()
        fill(page, "image-prompt", "an owl")
        fill(page, "image-seed", "7")
        fill(page, "image-steps", "2")
        page.locator("#image-go").click()
        expect(page.locator("#image-download")).to_be_enabled()
        fill(page, "image-prompt", "a banana")
        fill(page, "image-seed", "8")
        tab(page, "History")
        page.wait_for_function("document.querySelector('#history-gallery img')?.naturalWidth > 0")
        shot(page, "history-desk")
        page.locator("#history-gallery button.thumbnail-item, #history-gallery .thumbnail-item").first.click()
        expect(page.locator("#image-prompt textarea")).to_have_value("an owl")
        expect(page.locator("#image-seed input")).to_have_value("7")
        expect(page.locator("#image-steps input").first).to_have_value("2")

    def test_a_file_that_is_dropped_does_too(self, visit: Callable[..., Any], tmp_path: Path) -> None:
        job = Job("a penguin", seed=11, steps=2, width=128, height=128, methods={"hidiffusion": {"t1": 0.25}})
        with Session(job) as session:
            session.make([session.plan(Job(**{**vars(job), "output": tmp_path / "penguin.png"}))])
        page = visit()
        tab(page, "History")
        page.locator("#history-file input[type=file]").set_input_files(tmp_path / "penguin.png")
        expect(page.locator("#image-prompt textarea")).to_have_value("a penguin")
        expect(page.locator("#image-method input")).to_have_value("hidiffusion")
        page.locator("#image-hidiffusion-settings button").first.click()
        expect(page.locator("#image-hidiffusion-t1 input, #image-hidiffusion-t1 textarea")).to_have_value("0.25")

    def test_a_file_of_another_program_is_refused_in_words(self, visit: Callable[..., Any], tmp_path: Path) -> None:
        (tmp_path / "broken.png").write_bytes(b"no picture at all")
        page = visit()
        tab(page, "History")
        page.locator("#history-file input[type=file]").set_input_files(tmp_path / "broken.png")
        expect(message(page)).to_contain_text("broken.png")
        expect(page.locator("#history-file")).to_be_visible()


def test_what_somebody_has_written_into_a_file_is_shown_as_text(visit: Callable[..., Any], tmp_path: Path) -> None:
    leak, prompt = "<img src=http://localhost:19999/leak>", "![x](http://localhost:19999/y) <b>bold</b>"
    job = Job(prompt, steps=1, output=tmp_path / "told.png")
    with Session(job) as session:
        [result] = session.make([session.plan(job)])
    assert result.image is not None
    save.write_png(result.image, tmp_path / "leak.png", {**result.record, "model": leak})
    page = visit()
    tab(page, "History")
    page.locator("#history-file input[type=file]").set_input_files(tmp_path / "leak.png")
    expect(message(page)).to_contain_text(leak)
    expect(page.locator("#image-prompt textarea")).to_have_value(prompt)
    page.locator("#image-go").click()
    expect(page.locator("#image-download")).to_be_enabled()
    for name, shown in (("Inside", "#inside-summary"), ("History", "#history-said")):
        tab(page, name)
        expect(page.locator(shown)).to_be_visible()
    expect(page.locator("#history-said")).to_contain_text(leak)
    made_of_it = page.locator("a[href*='//localhost'], img[src*='//localhost']")
    assert made_of_it.evaluate_all("(all) => all.map((each) => each.outerHTML)") == []


class TestAnError:
    def test_is_a_message_and_the_page_lives_on(self, visit: Callable[..., Any]) -> None:
        page = visit()
        fill(page, "image-width", "65")
        expect(page.locator("#image-estimate")).to_contain_text("multiple of 8")
        page.locator("#image-go").click()
        expect(message(page)).to_contain_text("width 65 is not a multiple of 8")
        shot(page, "error-desk")
        fill(page, "image-width", "64")
        fill(page, "image-steps", "1")
        page.locator("#image-go").click()
        expect(page.locator("#image-download")).to_be_enabled()

    def test_of_a_server_that_takes_no_more_is_told_where_the_picture_would_be(self, visit: Callable[..., Any]) -> None:
        page = visit()
        page.wait_for_function("document.querySelector('#image-estimate').innerText.includes('tokens')")
        page.route("**/queue/join*", lambda route: route.fulfill(status=503, json={"detail": "Queue is full."}))
        page.locator("#image-go").click()
        expect(page.locator("#image-status")).to_contain_text("Not made: the server could not take it now.")
        page.unroute("**/queue/join*")
        fill(page, "image-steps", "1")
        page.locator("#image-go").click()
        expect(page.locator("#image-download")).to_be_enabled()


# Elements that stick out of the window at a side, and not out of something that scrolls.
BEYOND = """() => [...document.querySelectorAll(".gradio-container *")].filter((each) => {
  const { left, right, width, height } = each.getBoundingClientRect();
  if (!width || !height || (left > -1 && right < innerWidth + 1)) return false;
  for (let around = each.parentElement; around; around = around.parentElement)
    if (["auto", "scroll"].includes(getComputedStyle(around).overflowX)) return false;
  return true;
}).map((each) => each.outerHTML.slice(0, 200))"""


class TestAPhone:
    def test_shows_every_page_without_scrolling_sideways(self, visit: Callable[..., Any]) -> None:
        page = visit(PHONE, has_touch=True)
        fill(page, "image-steps", "2")
        page.locator("#image-go").click()
        expect(page.locator("#image-download")).to_be_enabled()
        for name in ("Image", "Video", "Compare", "Inside", "History"):
            open_on_phone(page, name)
            assert page.evaluate(BEYOND) == []
            shot(page, f"{name.lower()}-phone")

    def test_shows_what_came_of_a_comparison_and_inside_of_it(self, visit: Callable[..., Any]) -> None:
        page = visit(PHONE, has_touch=True)
        open_on_phone(page, "Compare")
        for field, value in {"compare-width": "96", "compare-height": "96", "compare-steps": "2"}.items():
            fill(page, field, value)
        choose(page, "compare-method", "hidiffusion")
        choose(page, "compare-second-method", "linfusion")
        page.locator("#compare-go").click()
        expect(page.locator("#compare-slider img").first).to_be_visible()
        expect(page.locator("#compare-density canvas, #compare-density svg").first).to_be_visible()
        expect(page.locator("#compare-key")).to_contain_text("linfusion")
        assert page.evaluate(BEYOND) == []
        shot(page, "compared-phone")
        open_on_phone(page, "Inside")
        expect(page.locator("#inside-picture img")).to_be_visible()
        assert page.evaluate(BEYOND) == []
        shot(page, "inside-phone")


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_the_buttons_are_in_sight_at_once(visit: Callable[..., Any], size: dict[str, int]) -> None:
    page = visit(size)
    for button in ("#image-go", "#image-stop"):
        expect(page.locator(button)).to_be_in_viewport(ratio=1)


def open_on_phone(page: Any, name: str) -> None:
    """Tabs that do not fit stand behind a button."""
    found = page.get_by_role("tab", name=name, exact=True)
    if not found.is_visible():
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown button", has_text=name).click()
        return
    found.click()


def test_the_dark_theme_is_taken_from_the_system(visit: Callable[..., Any]) -> None:
    page = visit(color_scheme="dark")
    expect(page.locator("body")).to_have_class(re.compile("dark"))
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background)[:3])) < 80
    shot(page, "image-dark")


def test_tab_through_the_form_changes_nothing(visit: Callable[..., Any]) -> None:
    page = visit()
    given = {"image-width": "128", "image-steps": "3", "image-guidance": "4"}
    for field, value in given.items():
        fill(page, field, value)
    page.wait_for_timeout(1000)
    page.locator("#image-prompt textarea").focus()
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#image-stop') !== null"):
            break
    else:
        pytest.fail("Tab never came to the button")
    page.wait_for_timeout(1000)
    assert {field: page.locator(f"#{field} input").first.input_value() for field in given} == given
    assert page.get_by_role("listbox").count() == 0


def test_a_picture_is_made_with_the_keyboard_alone(visit: Callable[..., Any]) -> None:
    page = visit()
    page.locator("#image-prompt textarea").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("a penguin")
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#image-go') !== null"):
            break
    else:
        pytest.fail("Tab never came to the button")
    page.keyboard.press("Enter")
    expect(page.locator("#image-download")).to_be_enabled()
