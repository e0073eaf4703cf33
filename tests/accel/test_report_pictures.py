"""Pictures of a report: cells have the colours of their values, masks the pixels of their blocks."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import attnswap
import pytest
import torch
from attnswap.accel import heat_map, report_pictures
from attnswap.accel.heat_map import DENSE, STRIPE, Mark, Scale
from attnswap.accel.report import Details, Report
from attnswap.kernels import BlockMask
from PIL import Image

from .drawn import corners
from .tiny_dit import flux

HEADS = 3
DENSITY = [[0.1, 0.2, 0.3], [0.2, 0.2, 0.2], [0.3, 0.1, 0.2]]
RECALL = [[0.9, 0.99, 0.8], [0.7, 0.75, 0.85], [0.95, 0.9, 0.6]]


def branch(density: Any, recall: Any, number: int = 0) -> dict[str, Any]:
    """As AdaSpa reports it; `density` and `recall` are of batch items and heads."""
    return {"branch": number, "searched_at": 2, "fell_back": False, "density": density, "kept": recall}


LOST = {"branch": 0, "searched_at": 2, "fell_back": True, "density": None, "kept": None}
WARM = {"branch": 0, "searched_at": None, "fell_back": False, "density": None, "kept": None}


def layers(*branches: list[dict[str, Any]], name: str = "blocks.{}.attn1") -> list[dict[str, Any]]:
    counts = {"pairs": 36, "dense_pairs": 100, "warm_pairs": 0}
    found = [{"name": name.format(number), "branches": found, **counts} for number, found in enumerate(branches)]
    return [*found, {"name": "blocks.0.attn2", **counts}]


def denoiser(*branches: list[dict[str, Any]]) -> dict[str, Any]:
    config = {"method": "adaspa", "sparsity": 0.8}
    return {"model": "Model", "method": ["adaspa"], "config": config, "layers": layers(*branches)}


def searched() -> dict[str, Any]:
    return denoiser(*([branch([density], [recall])] for density, recall in zip(DENSITY, RECALL, strict=True)))


def drawn(report: Report, folder: Path) -> Image.Image:
    path = folder / "report.png"
    report.plot(path)
    assert [found.name for found in folder.iterdir()] == ["report.png"]
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.convert("RGB")


def near(cell: tuple[int, int, int, int]) -> tuple[int, int]:
    """A pixel of the cell where no number is written."""
    return cell[0] + 1, cell[1] + 1


def test_every_cell_has_the_colour_of_its_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = corners(monkeypatch)
    image = drawn(Report((searched(),)), tmp_path)
    assert [each.title.split(":")[0] for each, _ in maps] == ["Density", "Recall"]
    for (each, place), values in zip(maps, (DENSITY, RECALL), strict=True):
        for row, head in itertools.product(range(3), range(HEADS)):
            assert image.getpixel(near(place.box(row, head))) == each.scale.colour(values[row][head])
    density, recall = (each.scale for each, _ in maps)
    assert (density.low, density.high) == pytest.approx((0.1, 0.3))
    assert (recall.low, recall.high) == pytest.approx((0.6, 1.0))


def test_a_cell_is_the_mean_over_guidance_branches_and_batch_items_and_the_lowest_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = corners(monkeypatch)
    first = branch([[0.1, 0.2], [0.3, 0.2]], [[0.9, 0.9], [0.9, 0.9]])
    second = branch([[0.2, 0.2], [0.2, 0.4]], [[0.9, 0.9], [0.9, 0.5]], 1)
    report = Report((denoiser([first, second]),))
    drawn(report, tmp_path)
    (density, _), (recall, _) = maps
    assert density.cells == [pytest.approx([0.2, 0.25])]
    assert recall.cells == [pytest.approx([0.9, 0.8])]
    assert recall.says == "mean 0.850, from 0.500 to 0.900"
    [said] = [text for text in report_pictures._caption(_layers(report)) if "Lowest" in text]
    assert "mean over 2 guidance branches and 2 batch items" in said
    assert "0.500: layer 0 (blocks.0.attn1), head 1, guidance branch 1, batch item 1" in said


def _layers(report: Report) -> list[Any]:
    return [layer for group in report_pictures._denoisers(report) for layer in group]


def test_layers_that_stayed_dense_or_fell_back_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = corners(monkeypatch)
    report = Report(
        (denoiser([branch([DENSITY[0]], [RECALL[0]])], [], [WARM], [LOST, branch([DENSITY[0]], [RECALL[0]])]),)
    )
    image = drawn(report, tmp_path)
    for each, place in maps:
        assert [row[0] for row in each.cells[1:]] == [Mark.DENSE, Mark.DENSE, Mark.FELL_BACK]
        for head in range(HEADS):
            assert image.getpixel(near(place.box(1, head))) == image.getpixel(near(place.box(2, head))) == DENSE
            assert {STRIPE, heat_map.PAPER} <= colours(image.crop(place.box(3, head)))
    below = image.crop((0, maps[0][1].top + maps[0][1].height, image.width, image.height))
    assert {DENSE, STRIPE} <= colours(below), "the legend shows both"
    assert STRIPE not in colours(drawn(Report((searched(),)), tmp_path)), "but only what there is"


def colours(image: Image.Image) -> set[Any]:
    return {colour for _, colour in image.getcolors(image.width * image.height) or []}


def test_denoisers_are_drawn_under_each_other_in_the_same_colours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = corners(monkeypatch)
    other = denoiser([branch([[0.9] * HEADS], [[0.5] * HEADS])], [])
    image = drawn(Report((searched(), other)), tmp_path)
    (density, above), (_, beside), (later, below), _ = maps
    assert (density.first_row, later.first_row) == (0, 3), "layers are counted through"
    assert above.left == below.left < beside.left
    assert above.top + above.height < below.top
    assert density.scale == later.scale
    assert image.getpixel(near(below.box(0, 0))) == density.scale.colour(0.9)


@pytest.mark.parametrize(("rows", "heads"), [(1, 1), (2, 2), (60, 24), (40, 48)])
def test_any_number_of_layers_and_heads_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, heads: int
) -> None:
    maps = corners(monkeypatch)
    value = [branch([[0.2] * heads], [[0.9] * heads])]
    image = drawn(Report((denoiser(*[value] * rows),)), tmp_path)
    for each, place in maps:
        left, top, right, bottom = place.box(rows - 1, heads - 1)
        assert left < right < image.width
        assert top < bottom < image.height
        assert image.getpixel(near((left, top, right, bottom))) == each.scale.colour(0.2 if each is maps[0][0] else 0.9)
    assert maps[0][1].left + maps[0][1].width < maps[1][1].left
    assert image.width < 1600


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([0.1, 0.30000001], 0.1, 0.3),
        ([1.0, 1.0], 0.9, 1.0),
        ([0.0], 0.0, 0.1),
        ([0.0, 1.0], 0.0, 1.0),
        ([0.962], 0.9, 1.0),
    ],
)
def test_a_scale_has_round_ends_and_some_width(values: list[float], low: float, high: float) -> None:
    scale = Scale.of(values)
    assert (scale.low, scale.high) == pytest.approx((low, high))
    assert (scale.ticks[0], scale.ticks[-1]) == pytest.approx((low, high))
    assert all(f"{tick:.2f}" == f"{tick:.6f}".rstrip("0").ljust(4, "0") for tick in scale.ticks)


def test_more_is_brighter_all_along_the_scale() -> None:
    scale = Scale(0.0, 1.0, 0.2)
    light = [sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), scale.colour(x / 50), strict=True)) for x in range(51)]
    assert light == sorted(light)
    assert scale.colour(0.0) == (68, 1, 84)
    assert scale.colour(1.0) == (253, 231, 37)


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    for report in (Report((denoiser(),)), Report((denoiser([], [WARM]),))):
        with pytest.raises(ValueError, match=r"no density and no recall to draw: nothing was searched$"):
            report.plot(tmp_path / "report.png")
    with pytest.raises(ValueError, match=r"every search fell back to dense$"):
        Report((denoiser([LOST], []),)).plot(tmp_path / "report.png")
    assert not list(tmp_path.iterdir())


def test_a_name_that_will_not_do_is_refused_in_one_line(tmp_path: Path) -> None:
    report = Report((searched(),))
    for name in ("report.jpg", "report"):
        with pytest.raises(ValueError, match=rf"{name}: the name of the picture must end in \.png$"):
            report.plot(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"missing does not exist$"):
        report.plot(str(tmp_path / "missing" / "report.png"))
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OSError, match=r"folder\.png"):
        report.plot(tmp_path / "folder.png")
    assert [found.name for found in tmp_path.iterdir()] == ["folder.png"]


# Masks.


def dense_mask(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def with_masks(*masks: dict[tuple[str, int], torch.Tensor]) -> Report:
    """A denoiser of three layers for each, whose masks by layer and branch are these."""
    return Report(
        (searched(),) * len(masks),
        tuple(Details({}, {}, (), {where: BlockMask.from_dense(kept) for where, kept in of.items()}) for of in masks),
    )


@pytest.mark.parametrize("blocks", [(1, 1), (5, 7), (13, 9), (700, 650)])
def test_pixels_are_the_kept_blocks(blocks: tuple[int, int]) -> None:
    kept = dense_mask(2, HEADS, *blocks)
    image = with_masks({("blocks.0.attn1", 0): kept}).mask_image("blocks.0.attn1", 1, item=1)
    inside = image.crop((1, 1, image.width - 1, image.height - 1))
    scale = inside.width // blocks[1]
    assert inside.size == (blocks[1] * scale, blocks[0] * scale)
    assert scale == (1 if blocks[0] > 512 else min(32, 512 // max(blocks)))
    light = torch.tensor(list(inside.tobytes())).view(inside.height, inside.width) > 128
    assert torch.equal(light, kept[1, 1].repeat_interleave(scale, 0).repeat_interleave(scale, 1))
    frame = {image.getpixel((x, y)) for x in range(image.width) for y in (0, image.height - 1)}
    assert len(frame) == 1
    assert not frame & {value for _, value in inside.getcolors()}


def test_a_layer_is_called_by_its_number_in_the_picture_or_its_name() -> None:
    masks = {(f"blocks.{layer}.attn1", 0): dense_mask(1, HEADS, 6, 6, seed=layer) for layer in (0, 2)}
    report = with_masks(masks)
    assert report.mask_image(2, 0) == report.mask_image("blocks.2.attn1", 0) != report.mask_image(0, 0)


def test_branches_have_their_own_masks() -> None:
    report = with_masks({("blocks.0.attn1", number): dense_mask(1, HEADS, 6, 6, seed=number) for number in (0, 1)})
    assert report.mask_image(0, 0, branch=1) != report.mask_image(0, 0)


def test_numbers_count_through_denoisers_and_a_name_in_both_is_not_enough() -> None:
    report = with_masks(*({("blocks.1.attn1", 0): dense_mask(1, HEADS, 6, 6, seed=number)} for number in (0, 1)))
    assert report.mask_image(1, 0) != report.mask_image(4, 0)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn1 has masks in 2 denoisers: give its number, 1 or 4$"):
        report.mask_image("blocks.1.attn1", 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"layer": 7}, "no layer 7: there are masks of layer 0, 2 (blocks.0.attn1 to blocks.2.attn1)"),
        ({"layer": "block"}, "no layer 'block': there are masks of layer 0, 2 (blocks.0.attn1 to blocks.2.attn1)"),
        ({"layer": 1}, "layer 1 (blocks.1.attn1) has no mask: there are masks of layer 0, 2"),
        ({"head": 3}, "blocks.0.attn1 has 3 heads: 0 to 2, not 3"),
        ({"head": -1}, "blocks.0.attn1 has 3 heads: 0 to 2, not -1"),
        ({"item": 2}, "blocks.0.attn1 has a batch of 2: 0 to 1, not 2"),
        ({"branch": 1}, "blocks.0.attn1 has masks of guidance branch 0, not of 1"),
    ],
)
def test_a_mask_that_is_not_there_is_answered_with_those_that_are(arguments: dict[str, Any], says: str) -> None:
    report = with_masks({(f"blocks.{layer}.attn1", 0): dense_mask(2, HEADS, 4, 4) for layer in (0, 2)})
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        report.mask_image(**{"layer": 0, "head": 0, **arguments})
    assert "\n" not in str(refused.value)


def test_without_masks_that_is_said() -> None:
    for report in (Report((searched(),)), Report((searched(),), (None,)), with_masks({})):
        with pytest.raises(ValueError, match="this report has no masks: no search has made one"):
            report.mask_image(0, 0)


# Of a run.


def test_a_run_of_adaspa_makes_a_screen_a_picture_and_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = corners(monkeypatch)
    pipe, arguments = flux()
    config = attnswap.AdaSpa(sparsity=0.5, min_tokens=0, block=(16, 16), search_steps=(2,), dense_layers=(0,))
    with attnswap.kernels.use_backend("reference"), attnswap.enabled(pipe, config) as handle, torch.no_grad():
        pipe(**{**arguments, "height": 32, "width": 32, "num_inference_steps": 3, "output_type": "latent"})
    report = handle.report()
    text = str(report)
    assert len(text.splitlines()) <= 12
    assert max(map(len, text.splitlines())) < 160
    for said in ("searches at step 2 of 3", "2 accelerated, 4 dense; 2 with a search", "recall, the share of", " MiB"):
        assert said in text
    drawn(report, tmp_path)
    (density, _), (recall, _) = maps
    assert density.cells[0] == [Mark.DENSE] * 2, "counted as dense_layers counts"
    [name] = {name for name, _ in report.details[0].masks}
    found = [report.details[0].masks[name, number] for number in (0, 1)]
    assert density.cells[1] == [pytest.approx(_density(found, head)) for head in (0, 1)]
    assert all(0.5 < cell < 1 for cell in recall.cells[1])
    image = report.mask_image(1, 1, branch=1)
    light = torch.tensor(list(image.crop((1, 1, image.width - 1, image.height - 1)).tobytes())).float() > 128
    assert light.float().mean().item() == pytest.approx(found[1].to_dense()[0, 1].float().mean().item())


def _density(masks: list[BlockMask], head: int) -> float:
    return sum(mask.to_dense()[0, head].float().mean().item() for mask in masks) / len(masks)


def test_for_a_narrow_page_recall_is_below_density_in_the_same_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = corners(monkeypatch)
    image = report_pictures.draw(Report((searched(), searched())), beside=False)
    assert [each.title.split(":")[0] for each, _ in maps] == ["Density", "Recall"] * 2
    places = [place for _, place in maps]
    assert len({place.left for place in places}) == 1
    assert all(above.top + above.height < below.top for above, below in itertools.pairwise(places))
    for each, place in maps:
        for row, head in itertools.product(range(3), range(HEADS)):
            assert image.getpixel(near(place.box(row, head))) == each.scale.colour(each.cells[row][head])
    assert image.width < 600


def test_every_mask_that_can_be_drawn_is_listed_with_what_it_keeps() -> None:
    kept = torch.zeros(2, 3, 4, 4, dtype=torch.bool)
    kept[..., 0] = True
    kept[1, 2, :, :3] = True
    values = [branch([[0.25] * 3, [0.25, 0.25, 0.75]], [RECALL[0], RECALL[1]])]
    masks = {("blocks.1.attn1", 0): BlockMask.from_dense(kept)}
    report = Report((denoiser([], values),), (Details({}, {}, (), masks),))
    [found] = report_pictures.masks(report)
    assert (found.number, found.name) == (1, "blocks.1.attn1")
    assert list(found.kept) == [(0, item, head) for item in range(2) for head in range(3)]
    assert list(found.kept.values()) == pytest.approx([0.25] * 5 + [0.75])
    assert found.recall[0, 1, 2] == RECALL[1][2]
    for branch_, item, head in found.kept:
        report.mask_image(found.number, head, branch=branch_, item=item)
    assert report_pictures.masks(Report((searched(),))) == ()


def test_rows_of_several_have_the_number_of_their_first(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(heat_map.ImageDraw.ImageDraw, "text", lambda self, at, said, **more: written.append(said))
    image = Image.new("RGB", (700, 700))
    rows = [[0.5] * 10, [0.5] * 3]
    heat_map.HeatMap("", "", rows, 32, Scale(0, 1, 0.2), 10).draw(image, 0, 0, down="layer", across="+")
    assert {"32", "42"} <= set(written)
    assert written.count("0.50") == 13
