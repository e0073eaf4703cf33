"""What AdaSpa tells of its searches: recall and sparsity of every head, time and memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..report import Details
from ..stopwatch import Span, Stopwatch
from .adaspa_state import LayerState

# `dense_search` is a first search that is one pass with the dense attention of its step.
_PARTS = ("search", "dense_search", "mask")


def details_of(
    names: Iterable[str],
    states: Mapping[tuple[int, str], LayerState],
    watches: Mapping[str, Stopwatch],
    span: Span,
) -> Details:
    """Read from the device what `states` (by guidance branch and layer) hold, since the run that is or was last.

    Args:
        names: of all layers that search, or would if they were not to stay dense.
        watches: by layer, what took how long since enable or reset.
        span: of the runs.
    """
    layers: dict[str, dict[str, Any]] = {name: {"branches": []} for name in names}
    for (branch, name), state in sorted(states.items(), key=lambda entry: entry[0][0]):
        layers[name]["branches"].append(_branch(branch, state))
    for name, layer in layers.items():
        for part in _PARTS:
            layer[f"{part}_seconds"] = watches[name].seconds(part) if name in watches else 0.0
    summary = {
        "run_seconds": span.seconds,
        **{
            name: math.fsum(layer[name] for layer in layers.values()) for name in (f"{part}_seconds" for part in _PARTS)
        },
        "state_bytes": sum(state.peak_bytes for state in states.values()),
    }
    masks = {(name, branch): state.mask for (branch, name), state in states.items() if state.mask is not None}
    return Details(summary, layers, tuple(_lines(summary, layers)), masks)


def _branch(branch: int, state: LayerState) -> dict[str, Any]:
    """Of the last search; lists are `[B][H]`."""
    mask, has_numbers = state.mask, state.finite is None or bool(state.finite)
    kept_blocks = None if mask is None else mask.counts.float().mean(dim=-1) / mask.key_blocks
    return {
        "branch": branch,
        "searched_at": state.searched_at,
        "fell_back": state.dense,
        "density": _lists(kept_blocks),
        "recall": _lists(state.recall if has_numbers else None),
        "kept": _lists(state.kept if has_numbers else None),
        "level": _lists(state.level if has_numbers else None),
        "clamped_rows": None if state.clamped is None else int(state.clamped),
        "state_bytes": state.peak_bytes,
    }


def _lists(found: Tensor | None) -> list[Any] | None:
    """None, too, where there are no numbers: JSON has none for that."""
    return None if found is None or not bool(found.isfinite().all()) else found.tolist()


def _lines(summary: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    heads = [
        (recall, kept, level, f"{name}, head {head}")
        for name, layer in layers.items()
        for branch in layer["branches"]
        if branch["recall"] is not None
        for item in zip(branch["recall"], branch["kept"], branch["level"], strict=True)
        for head, (recall, kept, level) in enumerate(zip(*item, strict=True))
    ]
    spoilt = [
        name
        for name, layer in layers.items()
        if any(x["searched_at"] and x["kept"] is None and not x["fell_back"] for x in layer["branches"])
    ]
    warnings = []
    if spoilt:
        # Of a run's last search, as no call came after that could have noted it.
        warnings = [f"{len(spoilt)} layers met no numbers in their last search: {', '.join(spoilt)}"]
    if not heads:
        return warnings
    kept = [entry[1] for entry in heads]
    lowest = min(heads, key=lambda entry: entry[1])
    levels = [sum(entry[2] == level for entry in heads) for level in (-1, 0, 1)]
    one_pass = ""
    if summary["dense_search_seconds"]:
        one_pass = f"{_share('dense_search', summary)} in those that are one with dense attention, "
    lines = [
        *warnings,
        f"recall, the share of the attention in the kept blocks, when searched: mean {sum(kept) / len(kept):.3f}, "
        f"lowest {lowest[1]:.3f} ({lowest[3]})",
        f"heads: {levels[0]} at a lower sparsity, {levels[1]} at the one asked for, {levels[2]} at a higher one",
        f"time: {_share('search', summary)} in searches, {one_pass}{_share('mask', summary)} in making masks; the run "
        f"took {summary['run_seconds']:.2f} s",
        f"memory of the masks and of what searches need: {summary['state_bytes'] / 2**20:.3g} MiB at most",
    ]
    clamped = sum(branch["clamped_rows"] or 0 for layer in layers.values() for branch in layer["branches"])
    if clamped:
        lines.append(f"{clamped} query rows drifted too far from their last search for exact scores")
    return lines


def _share(part: str, summary: Mapping[str, Any]) -> str:
    seconds, whole = summary[f"{part}_seconds"], summary["run_seconds"]
    return f"{seconds:.2f} s" + (f" ({seconds / whole:.1%})" if whole else "")
