"""What the Inside page says of a run, beside its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...pipelines.compare.text import count, percent, share
from ..server.live import without_folders
from . import words
from .inside_pictures import PARTS, Phases, counted, in_words

if TYPE_CHECKING:
    from ...accel.report import Report
    from ...accel.report_pictures import Masked
    from ...pipelines.session import Result
    from ..server.shelf import Offer

HEADERS = ("Layer", "Name", "Attention", "Calls", "Density", "Computed by", "Why")
#: Where a search made block masks that are not there any more.
MASKS_GONE = "Block masks are kept of the latest results only."
#: Says that a report counts what never ran on a kernel of its own.
NONE = "–"


def summary(result: Result, offer: Offer | None) -> str:
    """Markdown: what ran, how much of dense attention was computed and by what, and what fell back and why."""
    lines = [f"{words.headline(result)} Model: {result.record['model']}.", *words.acceleration(result)]
    if result.report is not None:
        lines += _figures(result.report)
    lines += words.others(result)
    if result.report is None:
        lines.append(to_try(result, offer))
    title, *rest = (words.plain(without_folders(line.removesuffix(" See Inside."))) for line in lines)
    return "\n".join([f"**{title}**", "", *(f"- {line}" for line in dict.fromkeys(rest))])


def _figures(report: Report) -> list[str]:
    """The density and what it means, what computed it, searches and how good they were."""
    lines = [
        f"Density {share(report.density)}: the share of query-key pairs that was computed, of all that dense attention "
        "computes in these layers. 1 is dense attention; less is less work."
    ]
    layers = [layer for denoiser in report.denoisers for layer in denoiser["layers"] if counted(layer)]
    if "linfusion" in report.denoisers[0]["method"]:
        more = sum(layer["density"] > 1 for layer in layers)
        lines.append(
            "Linear attention forms no pairs; its work is counted as that of so many pairs."
            + (f" In {count(more, 'layer')} with few tokens it is more than that of dense attention." if more else "")
        )
    backends = sorted({layer["backend"] for layer in layers if layer["backend"]})
    if backends:
        lines.append(f"Computed by: {', '.join(backends)}{' (plain PyTorch)' if backends == ['eager'] else ''}.")
    if report.searches:
        lines.append(f"{report.searches} times a layer searched for the blocks that matter most.")
    if masks_are_gone(report):
        lines.append(MASKS_GONE)
    told = [line for details in report.details if details is not None for line in details.lines]
    return lines + [f"{line[:1].upper()}{line[1:]}." for line in told]


def to_try(result: Result, offer: Offer | None) -> str:
    """What to do for somebody who has seen dense attention."""
    if offer is None:
        return "Its model is not offered here."
    methods = [name for name in offer.methods[2:] if "+" not in name]
    if not methods:
        return f"No method applies to {offer.label}."
    said = f"To see less work, make it again with the method {' or '.join(methods)}"
    if "hidiffusion" in methods and (result.job.width, result.job.height) == (offer.native.width, offer.native.height):
        return (
            f"{said}, and larger: hidiffusion acts on pictures above {offer.native.width}×{offer.native.height} only."
        )
    return f"{said}. The more pixels or frames, the more there is to save."


def of_phases(phases: Sequence[Phases]) -> str:
    """Markdown: in which steps HiDiffusion's parts were at work, and why where they were not."""
    lines = []
    for number, each in enumerate(phases, 1):
        run = f"Run {number} of {len(phases)}, latent {each.latent}" if len(phases) > 1 else f"Latent {each.latent}"
        if each.rested:
            why = each.state.removeprefix(words.INACTIVE)
            lines.append(f"{run}: HiDiffusion rested, because {words.RESTED.get(why, why)}.")
        elif each.steps is None:
            lines.append(f"{run}: {each.state}, so the U-Net was left as it is.")
        else:
            lines.append(f"{run}: {_steps(each, each.steps)}")
    bullet = "- " if len(lines) > 1 else ""
    return "\n".join(f"{bullet}{words.plain(line)}" for line in lines)


def _steps(phases: Phases, of: int) -> str:
    conv, pool, windows = (phases.at_work[part] for part in PARTS)
    deep = range(0, max(len(conv), pool.stop if pool else 0))
    if not deep:
        said = "the U-Net worked on maps of its usual size throughout."
    elif len(deep) == of:
        said = f"the deep blocks of the U-Net saw smaller maps, of about the size they were trained at, in {_all(of)}."
    else:
        said = (
            f"up to step {len(deep)} of {of} the deep blocks of the U-Net saw smaller maps, of about the size they "
            "were trained at, so that things are not drawn twice; after that the usual ones, for details."
        )
    if not windows:
        return f"{said} No layer attended in windows."
    return f"{said} The costliest layers attended in windows in {in_words(windows, of)}."


def _all(steps: int) -> str:
    return in_words(range(steps), steps)


def of_mask(layer: Masked, branch: int, item: int, head: int) -> str:
    """Markdown: what is light and dark in a block mask, and how much that is."""
    place = branch, item, head
    said = (
        f"Rows are blocks of queries, columns blocks of keys. **Light** blocks are computed: "
        f"{percent(layer.kept[place])} of them. **Dark** ones are left out."
    )
    if place in layer.recall:
        held = percent(layer.recall[place])
        said += f" When this was searched, the light ones held {held} of this head's attention (recall)."
    return said


def table(report: Report) -> list[list[str]]:
    """A row for each layer, those that ran dense first; numbers are those in the picture."""
    rows: list[tuple[bool, list[str]]] = []
    with_heads = has_heads(report)
    number = 0
    for place, denoiser in enumerate(report.denoisers, 1):
        named = f"{place}: " if len(report.denoisers) > 1 else ""
        for layer in denoiser["layers"]:
            in_picture = not with_heads or "branches" in layer
            fast, dense = layer["accelerated_calls"], layer["dense_calls"]
            calls = [f"{calls} {what}" for calls, what in ((fast, "accelerated"), (dense, "dense")) if calls]
            row = [
                str(number) if in_picture else NONE,
                f"{named}{layer['name']}",
                "accelerated" if fast else "dense",
                ", ".join(calls) or NONE,
                share(layer["density"]) if counted(layer) else NONE,
                layer["backend"] or NONE,
                _why(layer, denoiser),
            ]
            rows.append((bool(fast), row))
            number += in_picture
    return [row for _, row in sorted(rows, key=lambda entry: entry[0])]


def has_heads(report: Report) -> bool:
    """Whether a method tells density and recall of every head."""
    return any("branches" in layer for denoiser in report.denoisers for layer in denoiser["layers"])


def masks_are_gone(report: Report) -> bool:
    """Whether searches made block masks of which only the figures are left."""
    layers = [layer for denoiser in report.denoisers for layer in denoiser["layers"]]
    made = any(branch["density"] is not None for layer in layers for branch in layer.get("branches", ()))
    return made and not any(details.masks for details in report.details if details is not None)


def _why(layer: dict[str, Any], denoiser: dict[str, Any]) -> str:
    reason: str = words.LEFT.get(layer["reason"], layer["reason"])
    if not layer["accelerated"] or layer["accelerated_calls"]:
        return reason
    rested = [run["state"].removeprefix(words.INACTIVE) for run in denoiser["runs"] if words.INACTIVE in run["state"]]
    notes = [note["text"] for note in denoiser["notes"]]
    return "; ".join([f"{reason}, which rested", *dict.fromkeys([*rested, *notes])])
