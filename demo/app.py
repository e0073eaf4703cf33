"""The whole page: its tabs, and what goes from one to another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.themes.utils.fonts import LocalFont

from . import endpoint
from .pages.compare import ComparePage
from .pages.history import HistoryPage
from .pages.inside import InsidePage
from .pages.make import RUNNING, TAKEN_OUT, WAITING, MakePage

if TYPE_CHECKING:
    from .site import Site

TITLE = "attnswap"
ABOUT = """# attnswap
Pictures and clips with faster attention. Make one with a method, compare it with the model as it is, and see inside
what was accelerated. Everything runs on this machine."""
# Seconds between two looks for copies that Gradio has made of files, and the age at which they go.
COPIES = (600, 24 * 3600)
# One at a time, whichever page asks.
PREPARING = "preparing"
# What was running on another page, or was to, is not running there any more.
STOPPED = f"""(said, ...others) => [said, ...others.map((other) =>
  other === "{WAITING}" ? "{TAKEN_OUT}" : {RUNNING}.test(other) ? said : other)]"""
#: For `launch`. The fonts come with Gradio.
LOOK: dict[str, Any] = {
    "theme": gr.themes.Default(
        primary_hue="indigo",
        secondary_hue="indigo",
        neutral_hue="slate",
        radius_size="md",
        spacing_size="md",
        # The semi-bold one that Gradio brings lacks nearly all letters.
        font=[LocalFont("Source Sans Pro", weights=(400, 700)), "ui-sans-serif", "system-ui", "sans-serif"],
    ).set(
        # Gradio's own grey is too pale to read.
        body_text_color_subdued="*neutral_500",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
    ),
    "css_paths": [Path(__file__).with_name("style.css")],
    "footer_links": ["api"],
    # Gradio opens the list of a dropdown again by the very Tab that leaves it.
    "js": """() => addEventListener("keydown", (event) => {
      if (event.key === "Tab" && event.target.role === "combobox") event.stopPropagation();
    }, true)""",
}


def build(site: Site) -> gr.Blocks:
    """The page over what `site` offers; `launch(**LOOK)` shows it."""
    with gr.Blocks(analytics_enabled=False, title=TITLE, delete_cache=COPIES) as blocks:
        gr.Markdown(ABOUT, elem_id="about")
        with gr.Tabs(overflow_behavior="wrap", elem_id="tabs") as tabs:
            with gr.Tab("Image", id="image", elem_id="tab-image"):
                image = MakePage(site, clips=False)
            with gr.Tab("Video", id="video", elem_id="tab-video") as video_tab:
                video = MakePage(site, clips=True)
            with gr.Tab("Compare", id="compare", elem_id="tab-compare") as compare_tab:
                compare = ComparePage(site)
            with gr.Tab("Inside", id="inside", elem_id="tab-inside"):
                inside = InsidePage(site)
            with gr.Tab("History", id="history", elem_id="tab-history"):
                history = HistoryPage(site)
        for page in (image, video, compare, inside):
            page.wire()
        history.wire(image.form, video.form, tabs)
        _stop(site, [image, video], compare)
        for making, shown in ((image, blocks.load), (video, video_tab.select), (compare, compare_tab.select)):
            _prepare(making, shown)

        def gone(request: gr.Request) -> None:
            site.visitors.gone(request)

        blocks.unload(gone)
    return blocks


def _stop(site: Site, pages: list[MakePage], compare: ComparePage) -> None:
    """Stop ends whatever the visitor has running or waiting; of a comparison, what was finished is shown."""
    all_pages: list[MakePage | ComparePage] = [*pages, compare]
    ends: dict[str, Any] = {"cancels": [page.made for page in all_pages], "queue": False, "show_progress": "hidden"}
    quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "undocumented"}

    def tell(event: Any, page: MakePage | ComparePage) -> None:
        statuses = [page.status, *(each.status for each in all_pages if each is not page)]
        event.then(None, statuses, statuses, js=STOPPED, api_visibility="private")

    for page in pages:

        def stop(request: gr.Request, status: str, page: MakePage = page) -> str:
            return page.stopped(site.worker.stop(site.visitors.of(request).name), status)

        first = page is pages[0]
        stopped = page.stop.click(
            endpoint.named(stop, ["status"]),
            [page.status],
            [page.status],
            **ends,
            api_name="stop" if first else f"stop_{page.kind}",
            api_visibility="public" if first else "undocumented",
            api_description="Stop what you have running or waiting; says how far it came.",
        )
        left = endpoint.named(compare.leave, ["status", "said"])
        told = [compare.status, page.status]
        tell(stopped.then(left, told, compare.outputs, **quiet, api_name=f"left_by_{page.kind}"), page)
    rested = compare.stop.click(
        endpoint.named(compare.rest, ["status"]),
        [compare.status],
        compare.outputs,
        **ends,
        api_name="stop_compare",
        api_visibility="undocumented",
    )
    tell(rested, compare)


def _prepare(page: MakePage | ComparePage, shown: Any) -> None:
    """As soon as the page is shown, and when another model is chosen there."""
    prepared = gr.on(
        [shown, page.form.controls["model"].change],  # type: ignore[attr-defined]
        endpoint.named(page.form.prepare, page.form.names),
        page.form.inputs,
        [page.form.estimate],
        preprocess=False,
        api_name="prepare" if page.kind == "image" else f"prepare_{page.kind}",
        api_visibility="undocumented",
        concurrency_id=PREPARING,  # no job is to wait behind it
        concurrency_limit=1,
        show_progress="hidden",
        trigger_mode="always_last",
    )
    page.price_after(prepared, f"prepared_{page.kind}")  # of what is chosen by then
