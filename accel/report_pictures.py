"""Pictures of a report: density and recall of every layer and head, and single masks."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageOps

from .heat_map import FAINT, INK, PAPER, Cell, HeatMap, Mark, Scale, font, swatch, wrapped

if TYPE_CHECKING:
    from .report import Report

# Pixels.
_MARGIN = 36
_GAP = 28
_LINE = 25
_TITLE = 46
_HEADING = 42
_SWATCH = 44
_MASK_SIDE = 512
_MOST_PER_BLOCK = 32

_DROPPED, _FRAME, _KEPT = 36, 128, 244

_MAPS = {"density": "Density: share of the blocks computed", "recall": "Recall: share of the attention kept"}
_MARKS = {
    Mark.DENSE: "stayed dense: so configured, or never searched",
    Mark.FELL_BACK: "fell back to dense: its query or key was not finite",
}
# As many kinds of layers are told apart below the picture.
_KINDS = 4


@dataclass(frozen=True)
class _Value:
    """Of one head in one guidance branch and batch item."""

    head: int
    branch: int
    item: int
    density: float
    recall: float


@dataclass(frozen=True)
class _Layer:
    """A row of the picture.

    Attributes:
        number: counted through all denoisers.
        values: of all heads, branches and items.
        mark: why there are none to be shown.
        masks: by guidance branch.
    """

    number: int
    name: str
    values: tuple[_Value, ...]
    mark: Mark | None
    masks: Mapping[int, Any]

    @classmethod
    def of(cls, number: int, layer: Mapping[str, Any], masks: Mapping[int, Any]) -> _Layer:
        searched = [branch for branch in layer["branches"] if branch["searched_at"] is not None]
        if any(branch["fell_back"] or branch["kept"] is None for branch in searched):
            # In one branch is enough: what stands out is what went wrong.
            return cls(number, layer["name"], (), Mark.FELL_BACK, masks)
        values = tuple(
            _Value(head, branch["branch"], item, density, recall)
            for branch in searched
            for item, heads in enumerate(zip(branch["density"], branch["kept"], strict=True))
            for head, (density, recall) in enumerate(zip(*heads, strict=True))
        )
        return cls(number, layer["name"], values, None if searched else Mark.DENSE, masks)

    def cells(self, quantity: str, heads: int) -> list[Cell]:
        """By head, means over branches and batch items."""
        if self.mark is not None:
            return [self.mark] * heads
        by_head: dict[int, list[float]] = {}
        for value in self.values:
            by_head.setdefault(value.head, []).append(getattr(value, quantity))
        return [math.fsum(found) / len(found) for _, found in sorted(by_head.items())]


def plot(report: Report, path: str | os.PathLike[str]) -> None:
    """Draw density and recall of every layer (down) and head (across) as a PNG, written whole or not at all.

    Raises:
        ValueError: nothing was searched, or the name does not end in .png.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: the name of the picture must end in .png")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist")
    image = draw(report)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        image.save(part, format="PNG")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def mask_image(report: Report, layer: str | int, head: int, *, branch: int = 0, item: int = 0) -> Image.Image:
    """Which key blocks (columns) each query block (rows) attends to: kept ones light, dropped ones dark, in a frame.

    A block is a pixel, or a square of pixels where they are few.

    Args:
        layer: its name, or its number in the picture that `plot` draws.
        head: number of the head, from 0.
        branch: guidance branch, in the order of appearance.
        item: of the batch.

    Raises:
        ValueError: there is no such mask; the message says which there are.
    """
    found = _with_masks(report, layer)
    if branch not in found.masks:
        raise ValueError(f"{found.name} has masks of guidance branch {spans(found.masks)}, not of {branch}")
    mask = found.masks[branch]
    items, heads, _, _ = mask.shape
    if not 0 <= head < heads:
        raise ValueError(f"{found.name} has {heads} heads: {spans(range(heads))}, not {head}")
    if not 0 <= item < items:
        raise ValueError(f"{found.name} has a batch of {items}: {spans(range(items))}, not {item}")
    # The others need not be unpacked.
    one = slice(item, item + 1), slice(head, head + 1)
    kept = dataclasses.replace(mask, bits=mask.bits[one], counts=mask.counts[one]).to_dense()[0, 0].cpu()
    image = Image.fromarray((kept * (_KEPT - _DROPPED) + _DROPPED).byte().numpy())
    scale = min(max(_MASK_SIDE // max(image.size), 1), _MOST_PER_BLOCK)
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    return ImageOps.expand(image, border=1, fill=_FRAME)


@dataclass(frozen=True)
class Masked:
    """A layer of which `mask_image` has masks.

    Attributes:
        number: in the picture that `plot` draws.
        kept: share of the blocks that each mask keeps, by guidance branch, batch item and head.
        recall: share of the attention that they held when searched, by the same; without those nobody knows it of.
    """

    number: int
    name: str
    kept: Mapping[tuple[int, int, int], float]
    recall: Mapping[tuple[int, int, int], float]


def masks(report: Report) -> tuple[Masked, ...]:
    """Every mask that `mask_image` can draw."""
    return tuple(_masked(layer) for group in _denoisers(report) for layer in group if layer.masks)


def _masked(layer: _Layer) -> Masked:
    kept = {
        (branch, item, head): share
        for branch, mask in sorted(layer.masks.items())
        for item, heads in enumerate((mask.counts.float().mean(dim=-1) / mask.key_blocks).tolist())
        for head, share in enumerate(heads)
    }
    recall = {(value.branch, value.item, value.head): value.recall for value in layer.values}
    return Masked(layer.number, layer.name, kept, recall)


def _with_masks(report: Report, called: str | int) -> _Layer:
    """The one layer of that name or number that has masks."""
    layers = [layer for group in _denoisers(report) for layer in group]
    masked = [layer for layer in layers if layer.masks]
    if not masked:
        raise ValueError("this report has no masks: no search has made one since enable or reset")
    there = f"there are masks of layer {spans(layer.number for layer in masked)} ({masked[0].name}"
    there += f" to {masked[-1].name})" if len(masked) > 1 else ")"
    found = [layer for layer in layers if called in (layer.number, layer.name)]
    chosen = [layer for layer in found if layer.masks]
    if not found:
        raise ValueError(f"no layer {called!r}: {there}")
    if not chosen:
        raise ValueError(f"layer {found[0].number} ({found[0].name}) has no mask: {there}")
    if len(chosen) > 1:
        numbers = " or ".join(str(layer.number) for layer in chosen)
        raise ValueError(f"{called} has masks in {len(chosen)} denoisers: give its number, {numbers}")
    return chosen[0]


def _denoisers(report: Report) -> list[list[_Layer]]:
    """The layers of each denoiser that a method could search in."""
    groups: list[list[_Layer]] = []
    numbers = itertools.count()
    for denoiser, details in zip(report.denoisers, report.details or itertools.repeat(None), strict=False):
        masks: dict[str, dict[int, Any]] = {}
        for (name, branch), mask in ({} if details is None else details.masks).items():
            masks.setdefault(name, {})[branch] = mask
        layers = [layer for layer in denoiser["layers"] if "branches" in layer]
        groups.append([_Layer.of(next(numbers), layer, masks.get(layer["name"], {})) for layer in layers])
    return groups


# The picture.


def draw(report: Report, *, beside: bool = True) -> Image.Image:
    """The picture that `plot` writes; for narrow pages with recall below density, not `beside` it.

    Raises:
        ValueError: nothing was searched.
    """
    groups = [group for group in _denoisers(report) if group]
    layers = [layer for group in groups for layer in group]
    if not any(layer.values for layer in layers):
        why = "every search fell back to dense" if any(layer.mark is Mark.FELL_BACK for layer in layers) else ""
        raise ValueError(f"there is no density and no recall to draw: {why or 'nothing was searched'}")
    # Of each denoiser, with the maps that stand beside each other.
    rows = [[row] if beside else [[each] for each in row] for row in _maps(groups)]
    width = max(sum(each.size[0] for each in row) + _GAP * (len(row) - 1) for of in rows for row in of)
    letters = 30 if beside else 24
    titles = _wrapped([_title(report)], letters, width)
    above = _wrapped([_of_the_run(report, layers)], 18, width)
    below = _wrapped(_caption(layers), 17, width)
    legend = {
        mark: _wrapped([f"{said} (layer{'s' if len(marked) > 1 else ''} {spans(marked)})"], 17, width - _SWATCH)
        for mark, said in _MARKS.items()
        if (marked := [layer.number for layer in layers if layer.mark is mark])
    }
    heading = _HEADING if len(rows) > 1 else 0
    lines = len(above) + len(below) + sum(map(len, legend.values()))
    maps = sum(heading + sum(row[0].size[1] + _GAP for row in of) for of in rows)
    height = _TITLE * len(titles) + _LINE * lines + _GAP + maps

    image = Image.new("RGB", (width + 2 * _MARGIN, height + 2 * _MARGIN), PAPER)
    pen = ImageDraw.Draw(image)
    for number, line in enumerate(titles):
        pen.text((_MARGIN, _MARGIN + number * _TITLE), line, fill=INK, font=font(letters))
    y = _write(pen, (_MARGIN, _MARGIN + _TITLE * len(titles)), above, 18) + _GAP
    for number, of in enumerate(rows, 1):
        if heading:
            pen.text((_MARGIN, y), f"Denoiser {number} of {len(rows)}", fill=INK, font=font(24))
        y += heading
        for row in of:
            x = _MARGIN
            for each in row:
                each.draw(image, x, y, down="layer", across="head")
                x += each.size[0] + _GAP
            y += row[0].size[1] + _GAP
    for mark, said in legend.items():
        swatch(image, (_MARGIN, y + 2, _MARGIN + _SWATCH - 12, y + 18), mark)
        y = _write(pen, (_MARGIN + _SWATCH, y), said, 17)
    _write(pen, (_MARGIN, y), below, 17)
    return image


def _maps(groups: Sequence[Sequence[_Layer]]) -> list[list[HeatMap]]:
    """A row of maps for each denoiser, all with the same scales."""
    heads = 1 + max(value.head for group in groups for layer in group for value in layer.values)
    rows: list[list[HeatMap]] = [[] for _ in groups]
    for quantity, title in _MAPS.items():
        grids = [[layer.cells(quantity, heads) for layer in group] for group in groups]
        cells = [cell for grid in grids for row in grid for cell in row if not isinstance(cell, Mark)]
        scale = Scale.of(cells)
        for row, group, grid in zip(rows, groups, grids, strict=True):
            row.append(HeatMap(title, _range(quantity, group), grid, group[0].number, scale))
    return rows


def _range(quantity: str, layers: Iterable[_Layer]) -> str:
    found = [getattr(value, quantity) for layer in layers for value in layer.values]
    if not found:
        return "no search"
    return f"mean {math.fsum(found) / len(found):.3f}, from {min(found):.3f} to {max(found):.3f}"


def _title(report: Report) -> str:
    models = Counter(denoiser["model"] for denoiser in report.denoisers)
    named = " and ".join(model if count == 1 else f"{count} x {model}" for model, count in models.items())
    return f"{' + '.join(report.denoisers[0]['method'])} on {named}"


def _of_the_run(report: Report, layers: Sequence[_Layer]) -> str:
    config = report.denoisers[0]["config"]
    asked = f"Sparsity {config['sparsity']:g} asked for; " if "sparsity" in config else ""
    sparse = sum(bool(layer.values) for layer in layers)
    return (
        f"{asked}{sparse} of {len(layers)} layers sparse; density over all calls, dense ones included, "
        f"{report.density:.3f}. Brighter is more."
    )


def _caption(layers: Sequence[_Layer]) -> list[str]:
    values = [(value, layer) for layer in layers for value in layer.values]
    branches = len({value.branch for value, _ in values})
    items = len({value.item for value, _ in values})
    shown = "The last search of each layer"
    over = [f"{count} {what}" for count, what in ((branches, "guidance branches"), (items, "batch items")) if count > 1]
    if over:
        shown += f"; a cell is the mean over {' and '.join(over)}"
    lowest, layer = min(values, key=lambda entry: entry[0].recall)
    where = f"layer {layer.number} ({layer.name}), head {lowest.head}"
    where += f", guidance branch {lowest.branch}" if branches > 1 else ""
    where += f", batch item {lowest.item}" if items > 1 else ""
    return [f"{shown}. Lowest recall {lowest.recall:.3f}: {where}.", *_kinds(layers)]


def _kinds(layers: Sequence[_Layer]) -> list[str]:
    """What the numbers of layers stand for, where that is soon said."""
    kinds = [
        (kind, [layer.number for layer in same])
        for kind, same in itertools.groupby(layers, key=lambda layer: re.sub(r"\.\d+\.", ".*.", layer.name))
    ]
    if len(kinds) > _KINDS:
        return []
    return ["Layers: " + "; ".join(f"{spans(numbers)} {kind}" for kind, numbers in kinds) + "."]


def spans(numbers: Iterable[int]) -> str:
    """Ascending numbers in few words: "0 to 2, 5"."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][-1] + 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return ", ".join(" to ".join(map(str, span)) for span in found)


def _wrapped(texts: Iterable[str], size: int, width: int) -> list[str]:
    return [line for text in texts for line in wrapped(text, font(size), width)]


def _write(pen: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], size: int) -> int:
    """Write lines from `at` on; the y of the next."""
    x, y = at
    for line in lines:
        pen.text((x, y), line, fill=FAINT, font=font(size))
        y += _LINE
    return y
