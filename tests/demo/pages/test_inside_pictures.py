"""Pictures of what ran: cells and bars have the colours of what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attnswap
import pytest
from attnswap.accel import heat_map
from attnswap.accel.heat_map import DENSE, PAPER
from attnswap.accel.report import Report
from attnswap.demo.pages import inside_pictures as pictures
from attnswap.demo.pages.inside_pictures import AT_WORK, Phases
from attnswap.pipelines.job import Job
from attnswap.pipelines.session import Session
from PIL import Image

from ...accel.drawn import corners


def layer(name: str, density: float | None = None, *, calls: int = 2, reason: str = "deeper") -> dict[str, Any]:
    """As a report has it; without a density it was left as it is."""
    return {
        "name": name,
        "accelerated": density is not None,
        "reason": reason,
        "accelerated_calls": calls if density is not None else 0,
        "dense_calls": 0,
        "density": density,
    }


def denoiser(*layers: dict[str, Any], runs: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"model": "UNet", "method": ["hidiffusion"], "layers": list(layers), "runs": list(runs)}


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[heat_map.HeatMap, heat_map.Geometry]]:
    return corners(monkeypatch)


def colour(image: Image.Image, box: tuple[int, int, int, int]) -> Any:
    """Of a cell or bar, in its corner, where nothing is written."""
    return image.getpixel(box[:2])


class TestByLayer:
    def test_a_cell_has_the_colour_of_its_density_and_layers_left_dense_are_grey(self, maps: list[Any]) -> None:
        densities = [0.25, None, 1.0, None, 0.5, *[None] * 6, 0.0]
        image = pictures.by_layer(Report((denoiser(*(layer(str(n), d) for n, d in enumerate(densities))),)))
        [(drawn, place)] = maps
        for number, density in enumerate(densities):
            expected = DENSE if density is None else drawn.scale.colour(density)
            assert colour(image, place.box(*divmod(number, 10))) == expected, number
        assert (drawn.scale.low, drawn.scale.high) == (0.0, 1.0), "a colour means the same in every picture"
        assert drawn.says == "4 of 12 accelerated, from 0.000 to 1.000"
        assert colour(image, place.box(1, 5)) == PAPER, "there is no sixteenth layer"

    def test_rows_are_numbered_by_the_layers_they_begin_with(self, monkeypatch: pytest.MonkeyPatch) -> None:
        written = watch_text(monkeypatch)
        pictures.by_layer(Report((denoiser(*(layer(str(number), 0.5) for number in range(25))),)))
        assert {"0", "10", "20"} <= set(written)
        assert "30" not in written

    def test_says_why_layers_were_left_dense(self, monkeypatch: pytest.MonkeyPatch) -> None:
        written = watch_text(monkeypatch)
        cross = "not self-attention over image tokens"
        layers = [layer("a", 0.5), layer("b", reason=cross), layer("c", reason=cross), layer("d", 0.5, calls=0)]
        pictures.by_layer(Report((denoiser(*layers),)))
        said = " ".join(written)
        assert "left dense, attention to the prompt or the like, not within the picture: 1 to 2" in said
        assert "left dense, was not called: 3" in said

    def test_denoisers_are_below_each_other_and_counted_through(self, maps: list[Any]) -> None:
        one = denoiser(layer("a", 0.5), layer("b"))
        image = pictures.by_layer(Report((one, denoiser(layer("a", 0.25)))))
        (_, above), (second, below) = maps
        assert (second.first_row, second.row_step) == (2, 10)
        assert above.top + above.height < below.top
        assert colour(image, below.box(0, 0)) == second.scale.colour(0.25)

    def test_a_model_with_nothing_accelerated_is_all_grey(self, maps: list[Any]) -> None:
        image = pictures.by_layer(Report((denoiser(layer("a"), layer("b")),)))
        [(drawn, place)] = maps
        assert drawn.says == "no layer accelerated"
        assert {colour(image, place.box(0, column)) for column in range(2)} == {DENSE}

    @pytest.mark.parametrize("layers", [1, 9, 140, 400])
    def test_any_number_of_layers_fits(self, maps: list[Any], layers: int) -> None:
        image = pictures.by_layer(Report((denoiser(*(layer(str(number), 0.5) for number in range(layers))),)))
        [(_, place)] = maps
        right, bottom = place.box(*divmod(layers - 1, 10))[2:]
        assert right < image.width
        assert bottom < image.height
        assert image.width <= 600, "letters are to be read on a telephone"


def watch_text(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is written in pictures from here on."""
    written: list[str] = []
    text = pictures.ImageDraw.ImageDraw.text

    def watch(self: Any, xy: Any, said: str, *args: Any, **more: Any) -> None:
        written.append(said)
        text(self, xy, said, *args, **more)

    monkeypatch.setattr(pictures.ImageDraw.ImageDraw, "text", watch)
    return written


def bars(image: Image.Image, steps: int) -> list[list[bool]]:
    """Of each bar, from above: in which steps it is coloured."""
    found: list[list[bool]] = []
    x = pictures.step_box(0, steps, 0)[0]
    edges = [y for y in range(1, image.height) if is_bar(image, x, y) and not is_bar(image, x, y - 1)]
    for top in edges[: len(edges) - 1]:  # the last is the legend
        found.append([colour(image, pictures.step_box(step, steps, top)) == AT_WORK for step in range(steps)])
    return found


def is_bar(image: Image.Image, x: int, y: int) -> bool:
    return image.getpixel((x, y)) in (AT_WORK, DENSE)


class TestPhases:
    def test_a_bar_is_coloured_in_the_steps_in_which_its_part_was_at_work(self) -> None:
        at_work = {"conv": range(2), "pool": range(2, 5), "windows": range(7)}
        image = pictures.strip([Phases("32x32", 7, "small schedule", at_work)])
        assert image is not None
        conv, pool, windows = bars(image, 7)
        assert conv == [True] * 2 + [False] * 5
        assert pool == [False] * 2 + [True] * 3 + [False] * 2
        assert windows == [True] * 7

    def test_a_run_at_rest_has_no_bars(self) -> None:
        rest = Phases("16x16", 4, "inactive: native size", dict.fromkeys(pictures.PARTS, range(0)))
        assert pictures.strip([rest]) is None
        active = Phases("32x32", 4, "small schedule", dict.fromkeys(pictures.PARTS, range(1)))
        image = pictures.strip([rest, active])
        assert image is not None
        assert bars(image, 4) == [[True, False, False, False]] * 3

    @pytest.mark.parametrize("steps", [1, 50, 500])
    def test_any_number_of_steps_fits(self, steps: int) -> None:
        image = pictures.strip([Phases("32x32", steps, "", dict.fromkeys(pictures.PARTS, range(steps)))])
        assert image is not None
        left, _, right, _ = pictures.step_box(steps - 1, steps, 0)
        assert left <= right < image.width
        assert all(all(bar) for bar in bars(image, steps))

    def test_the_pooled_map_begins_where_the_convolution_ends(self) -> None:
        run = {"latent": "1x1", "steps": 9, "state": "", "conv_steps": 2, "pool_steps": 3, "windows_steps": 9}
        after = {**run, "conv": [0, 2], "pool": [2, 5]}
        beside = {**run, "conv": [0, 2], "pool": [0, 3]}
        found = pictures.phases_of(Report((denoiser(runs=(after, beside)),)))
        assert [each.at_work["pool"] for each in found] == [range(2, 5), range(3)]

    @pytest.mark.parametrize(
        ("steps", "said"),
        [
            (range(0), "never"),
            (range(12), "all 12 steps"),
            (range(1), "step 1 of 12"),
            (range(3, 6), "steps 4 to 6 of 12"),
        ],
    )
    def test_steps_are_counted_from_one(self, steps: range, said: str) -> None:
        assert pictures.in_words(steps, 12) == said


def test_a_real_run_is_drawn_as_it_was(tmp_path: Path) -> None:
    methods = {"hidiffusion": {"t1": 0.5, "t2": 0.25}}
    job = Job("a fox", tmp_path / "fox.png", width=128, height=128, steps=4, methods=methods)
    with Session(job) as session:
        [result] = session.make([session.plan(job)])
    assert isinstance(result.report, attnswap.Report)
    image = pictures.strip(pictures.phases_of(result.report))
    assert image is not None
    assert bars(image, 4) == [[True, True, False, False], [True, False, False, False], [True] * 4]


def test_a_mask_keeps_its_pixels_among_its_axes() -> None:
    mask = Image.new("L", (66, 66), 200)
    image = pictures.with_axes(mask)
    found = [(x, y) for x in range(image.width) for y in range(image.height) if image.getpixel((x, y)) == (200,) * 3]
    assert len(found) == 66 * 66
    assert found[0] == (40, 44)
    assert image.getpixel((0, 0)) == PAPER
