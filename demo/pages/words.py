"""What a run came to, in sentences for somebody who has not read the documentation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...pipelines.compare.text import count, memory, percent, seconds
from ...pipelines.settings import AUTO
from ..forms.reading import in_words, plain
from ..server.live import without_folders

if TYPE_CHECKING:
    from ...accel.report import Report
    from ...pipelines.session import Result
    from ..server.shelf import Offer
    from ..server.visitors import Entry

# What a method says of a run of the model in which it did nothing.
INACTIVE = "inactive: "
RESTED = {"native size": "the size is about that which the model was trained at, and it is for larger ones"}
# Why layers are left dense: in plain words, where a method's own need the papers.
LEFT = {
    "not self-attention over image tokens": "attention to the prompt or the like, not within the picture",
    "not self-attention over the picture or clip": "attention to the prompt or the like, not within the picture",
}


def preparing(offer: Offer) -> str:
    """What is done before the first step, which takes a while where the model has to be read."""
    return f"preparing {offer.label} …"


def headline(result: Result) -> str:
    """What was made, and how long it took."""
    job = result.job
    frames = f", {count(job.frames, 'frame')} at {job.fps} a second" if job.frames else ""
    methods = " and ".join(job.methods) or "dense attention"
    size = f"{job.width}×{job.height}{frames}, {count(job.steps or 0, 'step')}, seed {job.seed}"
    return f"Done in {seconds(result.seconds)} with {methods}: {size}{_route(result)}."


def _route(result: Result) -> str:
    """Of a picture that came about in stages, or of a clip in windows: which they were."""
    job = result.job
    if job.route == "direct":
        return ""
    if job.window:
        return f"; route {job.route}, {job.window} frames at a time"
    stages = " → ".join(f"{stage.width}×{stage.height}" for stage in result.stages)
    return f"; route {job.route}, stages {stages}"


def explained(result: Result) -> str:
    """Markdown: what was accelerated and what was not, then what else is to be known, as a list."""
    lines = [*acceleration(result), *others(result), cost(result)]
    return "\n".join(f"- {plain(without_folders(line))}" for line in lines)


def acceleration(result: Result) -> list[str]:
    """Which layers, how much of the attention was computed, and what stayed dense and why."""
    lines = [f"{AUTO} chose {why.removeprefix(f'{AUTO}: ')}." for why in _by_auto(result)]
    if result.report is None:
        return lines or ["Nothing was accelerated: the model ran as it is, with dense attention."]
    report = result.report
    lines.append(_layers(report))
    lines += [line for denoiser in report.denoisers for line in _runs(denoiser)]
    left = Counter(layer["reason"] for layer in _unique(report) if not layer["accelerated"])
    if left:
        said = ", ".join(f"{count(number, 'layer')} ({LEFT.get(reason, reason)})" for reason, number in left.items())
        lines.append(f"Left dense: {said}. See Inside.")
    return list(dict.fromkeys(lines))


def others(result: Result) -> list[str]:
    """What was done that nobody asked for, and where a method fell back."""
    chosen = {f"{why}." for why in _by_auto(result)}
    lines = [_sentence(in_words(notice)) for notice in result.notices if notice not in chosen]
    if result.report is not None and _calls(result.report)[0]:
        lines += [_sentence(note) for note in _notes(result.report)]
    return list(dict.fromkeys(lines))


def cost(result: Result) -> str:
    """What the time of the headline is of, and the memory."""
    took = f"The time is of denoising and decoding, on {result.record['device_name']}."
    if result.peak_bytes is None:
        return took
    of = "this whole program, models included" if result.device.type == "cpu" else "the accelerator"
    since = ", the most since it started" if result.peak_since_start else ""
    return f"{took} Memory: {memory(result.peak_bytes)} at most, of {of}{since}."


def details(entry: Entry) -> dict[str, Any]:
    """JSON: how it was made, as its file says, the figures of the run, and the number it has in the history."""
    result = entry.result
    return {
        **result.record,
        "entry": entry.number,
        "seconds": result.seconds,
        "peak_bytes": result.peak_bytes,
        "report": result.report.summary() if result.report else None,
        "notices": [without_folders(notice) for notice in result.notices],
    }


def _layers(report: Report) -> str:
    names = " and ".join(report.denoisers[0]["method"])
    layers = _unique(report)
    chosen = sum(layer["accelerated"] for layer in layers)
    fast, dense = _calls(report)
    if not fast:
        because = " and ".join(_why_rested(report))
        return f"{names} rested and nothing was accelerated{f', because {because}' if because else ''}."
    these, them = ("these", "them") if chosen > 1 else ("this one", "it")
    said = (
        f"{names} replaced {chosen} of {count(len(layers), 'attention layer')}; "
        f"{these} computed {percent(report.density)} of what dense attention computes there."
    )
    return f"{said} {dense} of {fast + dense} calls of {them} ran dense." if dense else said


def _runs(denoiser: Mapping[str, Any]) -> Iterable[str]:
    """What a method did besides attention, and where it rested while others worked."""
    worked = any(layer["accelerated_calls"] for layer in denoiser["layers"])
    for run in denoiser["runs"]:
        state = str(run.get("state", ""))
        if state.startswith(INACTIVE):
            if worked:
                yield f"hidiffusion rested at a latent of {run['latent']}, because {_reason(state)}."
        elif steps := max(run.get("conv_steps", 0), run.get("pool_steps", 0)):
            yield (
                f"In {steps} of {count(run['steps'], 'step')}, hidiffusion also shrank the feature maps deep in the "
                "U-Net: less work, and fewer repeated objects."
            )
    if worked and denoiser["searches"]:
        for remark in denoiser["remarks"]:
            if remark.startswith("searches at"):
                yield _sentence(f"it {remark}")


def _why_rested(report: Report) -> Sequence[str]:
    states = [str(run.get("state", "")) for denoiser in report.denoisers for run in denoiser["runs"]]
    reasons = [_reason(state) for state in states if state.startswith(INACTIVE)]
    return list(dict.fromkeys([*reasons, *_notes(report)]))


def _reason(state: str) -> str:
    said = state.removeprefix(INACTIVE)
    return RESTED.get(said, said)


def _by_auto(result: Result) -> list[str]:
    return [remark for remark in result.record.get("remarks", ()) if remark.startswith(f"{AUTO}: ")]


def _notes(report: Report) -> list[str]:
    return list(dict.fromkeys(note["text"] for denoiser in report.denoisers for note in denoiser["notes"]))


def _calls(report: Report) -> tuple[int, int]:
    """Accelerated and dense ones, of the layers that are accelerated."""
    chosen = [layer for denoiser in report.denoisers for layer in denoiser["layers"] if layer["accelerated"]]
    return sum(layer["accelerated_calls"] for layer in chosen), sum(layer["dense_calls"] for layer in chosen)


def _unique(report: Report) -> list[dict[str, Any]]:
    """Each layer of the model once; with other methods in another stage, there are several entries of it."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for denoiser in report.denoisers:
        for layer in denoiser["layers"]:
            known = found.setdefault((denoiser["model"], layer["name"]), layer)
            if layer["accelerated"] and not known["accelerated"]:
                found[denoiser["model"], layer["name"]] = layer
    return list(found.values())


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."
