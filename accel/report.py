"""What really ran: which layers were accelerated, how densely, on which backend, and what fell back and why."""

from __future__ import annotations

import warnings
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import AttnswapWarning

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
    """Counts of one layer since enable or reset."""

    plan: LayerPlan
    accelerated_calls: int = 0
    dense_calls: int = 0
    pairs: int = 0
    dense_pairs: int = 0
    backend: str | None = None
    planned_calls: int = 0
    planned_pairs: int = 0
    planned_dense_pairs: int = 0
    seen_calls: int = 0
    in_graph: bool = False

    def counted(self) -> LayerRecord:
        """With the calls that no layer could count because they ran inside a compiled graph, as they were planned."""
        unseen = self.planned_calls - self.seen_calls
        if unseen <= 0:
            return self
        return replace(
            self,
            accelerated_calls=self.accelerated_calls + unseen,
            pairs=self.pairs + self.planned_pairs * unseen // self.planned_calls,
            dense_pairs=self.dense_pairs + self.planned_dense_pairs * unseen // self.planned_calls,
            backend=self.backend or "in a compiled graph",
        )


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
    _warned: bool = False

    def begin(self) -> None:
        """Count one denoiser call."""
        self.denoiser_calls += 1
        for record in self.layers.values():
            record.in_graph = False

    def plan(self, layer: str, *, pairs: int, dense_pairs: int) -> None:
        """Note what a layer is going to do in a compiled graph, where it cannot count."""
        record = self.layers[layer]
        record.in_graph = True
        record.planned_calls += 1
        record.planned_pairs += pairs
        record.planned_dense_pairs += dense_pairs

    def count(self, layer: str, *, pairs: int, dense_pairs: int, accelerated: bool) -> None:
        """Count one attention call that computed `pairs` of its `dense_pairs` query-key pairs."""
        record = self.layers[layer]
        # Where compilation is off for a while, a call that was planned for a graph is counted here after all.
        record.seen_calls += record.in_graph
        if accelerated:
            record.accelerated_calls += 1
        else:
            record.dense_calls += 1
        record.pairs += pairs
        record.dense_pairs += dense_pairs

    def ran_on(self, layer: str, backend: str) -> None:
        """Record what computed a layer's accelerated attention."""
        self.layers[layer].backend = backend

    def note(self, text: str, *, warn: bool = False) -> None:
        """Keep a deviation with its reason; the first one that matters is also a warning."""
        self.notes[text] += 1
        if warn and not self._warned:
            self._warned = True
            warnings.warn(f"attnswap: {text}", AttnswapWarning, stacklevel=2)

    def reset(self) -> None:
        for name, record in self.layers.items():
            self.layers[name] = LayerRecord(record.plan)
        self.notes.clear()
        self.runs.clear()
        self.denoiser_calls = 0


@dataclass(frozen=True)
class Report:
    """A snapshot of what ran since `enable` or `Handle.reset()`."""

    denoisers: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, recorders: list[Recorder]) -> Report:
        return cls(tuple(_snapshot(recorder) for recorder in recorders))

    @property
    def density(self) -> float:
        """Computed query-key pairs over those of dense attention, in the accelerated layers; 1.0 before any call."""
        pairs = sum(layer["pairs"] for d in self.denoisers for layer in d["layers"])
        dense = sum(layer["dense_pairs"] for d in self.denoisers for layer in d["layers"])
        return pairs / dense if dense else 1.0

    def to_dict(self) -> dict[str, Any]:
        """A JSON document; `density` and `config` are those of the whole, `denoisers` has the details."""
        return {
            "method": self.denoisers[0]["method"],
            "config": self.denoisers[0]["config"],
            "density": self.density,
            "searches": sum(d["searches"] for d in self.denoisers),
            "denoisers": list(self.denoisers),
        }

    def __str__(self) -> str:
        return "\n".join(line for denoiser in self.denoisers for line in _render(denoiser, self.density))


def _snapshot(recorder: Recorder) -> dict[str, Any]:
    return {
        "model": recorder.model,
        "method": list(recorder.methods),
        "config": recorder.config,
        "calls": recorder.denoiser_calls,
        "searches": 0,
        "remarks": list(recorder.remarks.values()),
        "runs": [dict(run) for run in recorder.runs],
        "notes": [{"text": text, "count": count} for text, count in recorder.notes.items()],
        "layers": [
            {
                "name": record.plan.name,
                "accelerated": record.plan.accelerated,
                "reason": record.plan.reason,
                "accelerated_calls": record.accelerated_calls,
                "dense_calls": record.dense_calls,
                "pairs": record.pairs,
                "dense_pairs": record.dense_pairs,
                "backend": record.backend,
            }
            for record in (layer.counted() for layer in recorder.layers.values())
        ],
    }


def _render(denoiser: dict[str, Any], density: float) -> list[str]:
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
        lines.append(
            f"  attention calls in these layers: {fast} accelerated, {dense} dense; density {density:.2f}; "
            f"backend {backends}"
        )
    reasons = Counter(layer["reason"] for layer in layers if not layer["accelerated"])
    lines += [f"  left as it is: {count} layers, {reason}" for reason, count in reasons.items()]
    notes = denoiser["notes"]
    lines += [f"  note: {note['text']} (x{note['count']})" for note in notes[:_NOTES_SHOWN]]
    if len(notes) > _NOTES_SHOWN:
        lines.append(f"  {len(notes) - _NOTES_SHOWN} more notes in to_dict()")
    return lines
