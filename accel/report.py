"""What really ran: which layers were accelerated, how densely, on which backend, and what fell back and why."""

from __future__ import annotations

import os
import warnings
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import AttnswapWarning

if TYPE_CHECKING:
    from PIL.Image import Image

# A report stays one readable screen however long a session runs.
_RUNS_KEPT = 8
_NOTES_SHOWN = 8


@dataclass(frozen=True)
class LayerPlan:
    """One attention layer of a model and whether a method accelerates it."""

    name: str
    accelerated: bool
    reason: str


@dataclass(frozen=True)
class Inspection:
    """The dry run of `enable`: every attention layer, accelerated or not, and why."""

    model: str
    method: str
    layers: tuple[LayerPlan, ...]
    remarks: tuple[str, ...] = ()

    @property
    def accelerated(self) -> int:
        return sum(layer.accelerated for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "method": self.method,
            "layers": [vars(layer) for layer in self.layers],
            "remarks": list(self.remarks),
        }

    def __str__(self) -> str:
        lines = [f"{self.method} on {self.model}: {self.accelerated} of {len(self.layers)} attention layers"]
        lines += [f"  {remark}" for remark in self.remarks]
        lines += [f"  {'+' if x.accelerated else '-'} {x.name}  ({x.reason})" for x in self.layers]
        return "\n".join(lines)


@dataclass
class LayerRecord:
    """Counts of one layer since enable or reset; `pairs` may lie on a device until somebody reads them.

    `warm_pairs` are those of calls that computed all of them.
    """

    plan: LayerPlan
    accelerated_calls: int = 0
    dense_calls: int = 0
    searches: int = 0
    pairs: Any = 0
    dense_pairs: int = 0
    warm_pairs: int = 0
    backend: str | None = None

    def count(self, *, pairs: Any, dense_pairs: int, accelerated: bool, searched: bool) -> None:
        if accelerated:
            self.accelerated_calls += 1
        else:
            self.dense_calls += 1
            self.warm_pairs += dense_pairs
        self.searches += searched
        # Not in place: a report may hold what was there.
        self.pairs = self.pairs + pairs
        self.dense_pairs += dense_pairs


@dataclass(frozen=True)
class Details:
    """What a method tells beyond counts.

    Attributes:
        summary: of the denoiser, a part of `Report.to_dict()`.
        layers: by name, what is added to the counts of each.
        lines: for `str(report)`.
        masks: by layer and guidance branch, which key blocks each head keeps.
    """

    summary: dict[str, Any]
    layers: dict[str, dict[str, Any]]
    lines: tuple[str, ...]
    masks: dict[tuple[str, int], Any]


@dataclass(frozen=True)
class PlannedCall:
    """What a layer is going to do where it cannot count, in a compiled graph.

    A plan may tell by `ran` whether the layer was there in the end. Without that, or without a plan, layers are counted
    that one of Diffusers' caches leaves out.
    """

    batch: int
    tokens: int
    plan: Any


@dataclass
class Recorder:
    """Collects what happens in one denoiser; `Report` is a snapshot of one or several of these."""

    model: str
    methods: tuple[str, ...]
    config: dict[str, Any]
    layers: dict[str, LayerRecord] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    runs: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=_RUNS_KEPT))
    denoiser_calls: int = 0
    details: Callable[[], Details | None] = lambda: None
    _warned: bool = False
    _lasting: Counter[str] = field(default_factory=Counter)
    _planned: dict[str, PlannedCall] = field(default_factory=dict)

    def begin(self) -> None:
        """Count one denoiser call."""
        self.settle()
        self.denoiser_calls += 1

    def plan(self, layer: str, call: PlannedCall) -> None:
        """Note what a layer is going to do in a compiled graph."""
        self._planned[layer] = call

    def settle(self) -> None:
        """Count what was planned and not counted by the layer itself."""
        planned, self._planned = self._planned, {}
        for layer, call in planned.items():
            if not getattr(call.plan, "ran", True):
                continue
            pairs = None if call.plan is None else call.plan.pairs
            dense = call.tokens**2
            record = self.layers[layer]
            record.count(
                pairs=call.batch * (dense if pairs is None else pairs),
                dense_pairs=call.batch * dense,
                accelerated=pairs is not None,
                searched=call.plan is not None and call.plan.searches,
            )
            record.backend = record.backend or "in a compiled graph"

    def count(self, layer: str, *, pairs: Any, dense_pairs: int, accelerated: bool, searched: bool = False) -> None:
        """Count one attention call that computed `pairs` of its `dense_pairs` query-key pairs."""
        # Where compilation is off for a while, a call that was planned for a graph is counted here after all.
        self._planned.pop(layer, None)
        self.layers[layer].count(pairs=pairs, dense_pairs=dense_pairs, accelerated=accelerated, searched=searched)

    def ran_on(self, layer: str, backend: str) -> None:
        """Record what computed a layer's accelerated attention."""
        self.layers[layer].backend = backend

    def note(self, text: str, *, warn: bool = False) -> None:
        """Keep a deviation with its reason; the first one that matters is also a warning."""
        self.notes[text] += 1
        if warn and not self._warned:
            self._warned = True
            warnings.warn(f"attnswap: {text}", AttnswapWarning, stacklevel=2)

    def keep_notes(self) -> None:
        """Those so far are of what is in place, not of a run: they outlast `reset`."""
        self._lasting = Counter(self.notes)

    def reset(self) -> None:
        for name, record in self.layers.items():
            self.layers[name] = LayerRecord(record.plan)
        self.notes.clear()
        self.notes.update(self._lasting)
        self.runs.clear()
        self.denoiser_calls = 0
        self._planned.clear()


@dataclass(frozen=True)
class Report:
    """A snapshot of what ran since `enable` or `Handle.reset()`."""

    denoisers: tuple[dict[str, Any], ...]
    details: tuple[Details | None, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def of(cls, recorders: list[Recorder]) -> Report:
        details = tuple(recorder.details() for recorder in recorders)
        return cls(tuple(_snapshot(recorder, more) for recorder, more in zip(recorders, details, strict=True)), details)

    @property
    def density(self) -> float:
        """Computed query-key pairs over those of dense attention, in the accelerated layers; 1.0 before any call."""
        return _share(
            sum(layer["pairs"] for d in self.denoisers for layer in d["layers"]),
            sum(layer["dense_pairs"] for d in self.denoisers for layer in d["layers"]),
        )

    @property
    def searches(self) -> int:
        """Layer searches."""
        return sum(denoiser["searches"] for denoiser in self.denoisers)

    def summary(self) -> dict[str, Any]:
        """A few lines of JSON: what ran, how densely, and what deviated."""
        layers = [layer for denoiser in self.denoisers for layer in denoiser["layers"] if layer["accelerated"]]
        return {
            "methods": list(self.denoisers[0]["method"]),
            "density": self.density,
            "accelerated_calls": sum(layer["accelerated_calls"] for layer in layers),
            "dense_calls": sum(layer["dense_calls"] for layer in layers),
            "searches": self.searches,
            "backends": sorted({layer["backend"] for layer in layers if layer["backend"]}),
            "remarks": list(dict.fromkeys(remark for d in self.denoisers for remark in d["remarks"])),
            "notes": list(dict.fromkeys(note["text"] for d in self.denoisers for note in d["notes"])),
        }

    def to_dict(self) -> dict[str, Any]:
        """A JSON document; `density` and `config` are those of the whole, `denoisers` has the details."""
        return {
            "method": self.denoisers[0]["method"],
            "config": self.denoisers[0]["config"],
            "density": self.density,
            "searches": self.searches,
            "denoisers": list(self.denoisers),
        }

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw density and recall of every layer and head as a PNG.

        Raises:
            ValueError: nothing was searched, so that there is none, or the name does not end in .png.
            OSError: the file cannot be written.
        """
        from . import report_pictures

        report_pictures.plot(self, path)

    def mask_image(self, layer: str | int, head: int, *, branch: int = 0, item: int = 0) -> Image:
        """Which key blocks (columns) each query block (rows) attends to, kept ones light.

        Args:
            layer: its name, or its number in the picture that `plot` draws.
            head: number of the head, from 0.
            branch: guidance branch, in the order of appearance.
            item: of the batch.

        Raises:
            ValueError: there is no such mask; the message says which there are.
        """
        from . import report_pictures

        return report_pictures.mask_image(self, layer, head, branch=branch, item=item)

    def __str__(self) -> str:
        details = self.details or (None,) * len(self.denoisers)
        return "\n".join(
            line for denoiser, more in zip(self.denoisers, details, strict=True) for line in _render(denoiser, more)
        )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _snapshot(recorder: Recorder, details: Details | None) -> dict[str, Any]:
    recorder.settle()
    layers = [_layer(record, details) for record in recorder.layers.values()]
    return {
        "model": recorder.model,
        "method": list(recorder.methods),
        "config": recorder.config,
        "calls": recorder.denoiser_calls,
        "searches": sum(layer["searches"] for layer in layers),
        "remarks": list(recorder.remarks.values()),
        "runs": [dict(run) for run in recorder.runs],
        "notes": [{"text": text, "count": count} for text, count in recorder.notes.items()],
        **({} if details is None else details.summary),
        "layers": layers,
    }


def _layer(record: LayerRecord, details: Details | None) -> dict[str, Any]:
    pairs = round(float(record.pairs))
    return {
        "name": record.plan.name,
        "accelerated": record.plan.accelerated,
        "reason": record.plan.reason,
        "accelerated_calls": record.accelerated_calls,
        "dense_calls": record.dense_calls,
        "searches": record.searches,
        "pairs": pairs,
        "dense_pairs": record.dense_pairs,
        "warm_pairs": record.warm_pairs,
        "density": _share(pairs, record.dense_pairs),
        "density_accelerated": _share(pairs - record.warm_pairs, record.dense_pairs - record.warm_pairs),
        "backend": record.backend,
        **({} if details is None else details.layers.get(record.plan.name, {})),
    }


def _render(denoiser: dict[str, Any], details: Details | None) -> list[str]:
    layers = denoiser["layers"]
    chosen = [layer for layer in layers if layer["accelerated"]]
    lines = [
        f"{' + '.join(denoiser['method'])} on {denoiser['model']}: {denoiser['calls']} denoiser calls, "
        f"{len(chosen)} of {len(layers)} attention layers accelerated"
    ]
    lines += [f"  {remark}" for remark in denoiser["remarks"]]
    for run in denoiser["runs"]:
        lines.append("  run: " + ", ".join(f"{key} {value}" for key, value in run.items()))
    fast = sum(layer["accelerated_calls"] for layer in chosen)
    dense = sum(layer["dense_calls"] for layer in chosen)
    if fast or dense:
        backends = ", ".join(sorted({layer["backend"] for layer in chosen if layer["backend"]})) or "none"
        searches = f"{denoiser['searches']} with a search; " if denoiser["searches"] else ""
        lines.append(
            f"  attention calls in these layers: {fast} accelerated, {dense} dense; {searches}backend {backends}"
        )
        lines.append(f"  density in these layers, the share of query-key pairs computed: {_densities(layers)}")
    lines += [f"  {line}" for line in (() if details is None else details.lines)]
    reasons = Counter(layer["reason"] for layer in layers if not layer["accelerated"])
    lines += [f"  left as it is: {count} layer{'s' * (count > 1)}, {reason}" for reason, count in reasons.items()]
    notes = denoiser["notes"]
    lines += [f"  note: {note['text']} (x{note['count']})" for note in notes[:_NOTES_SHOWN]]
    if len(notes) > _NOTES_SHOWN:
        lines.append(f"  {len(notes) - _NOTES_SHOWN} more notes in to_dict()")
    return lines


def _densities(layers: list[dict[str, Any]]) -> str:
    pairs, whole = (sum(layer[key] for layer in layers) for key in ("pairs", "dense_pairs"))
    warm = sum(layer["warm_pairs"] for layer in layers)
    if warm in (0, whole):
        return f"{_share(pairs, whole):.2f}"
    return f"{_share(pairs, whole):.2f}, {_share(pairs - warm, whole - warm):.2f} without the dense calls"
