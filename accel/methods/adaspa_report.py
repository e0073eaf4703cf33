"""What AdaSpa tells of its searches: recall and sparsity of every head, time and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..report import Details
from ..stopwatch import Span, Stopwatch
from .adaspa_state import LayerState


def details_of(states: Mapping[tuple[int, str], LayerState], watches: Mapping[str, Stopwatch], span: Span) -> Details:
    """Read from the device what `states` (by guidance branch and layer) hold, since the run that is or was last."""
    layers: dict[str, dict[str, Any]] = {}
    for (branch, name), state in sorted(states.items(), key=lambda entry: entry[0][0]):
        layers.setdefault(name, _no_searches())["branches"].append(_branch(branch, state))
    for name, watch in watches.items():
        times = {"search_seconds": watch.seconds("search"), "mask_seconds": watch.seconds("mask")}
        layers.setdefault(name, _no_searches()).update(times)
    summary = {
        "run_seconds": span.seconds,
        "search_seconds": math.fsum(layer["search_seconds"] for layer in layers.values()),
        "mask_seconds": math.fsum(layer["mask_seconds"] for layer in layers.values()),
        "state_bytes": sum(state.peak_bytes for state in states.values()),
    }
    masks = {(name, branch): state.mask for (branch, name), state in states.items() if state.mask is not None}
    return Details(summary, layers, tuple(_lines(summary, layers)), masks)


def _no_searches() -> dict[str, Any]:
    return {"branches": [], "search_seconds": 0.0, "mask_seconds": 0.0}


def _branch(branch: int, state: LayerState) -> dict[str, Any]:
    """Of the last search; lists are `[B][H]`."""
    found: dict[str, Any] = {"branch": branch, "searched_at": state.searched_at, "fell_back": state.dense}
    if state.mask is not None:
        _, _, _, key_blocks = state.mask.shape
        per_head = state.mask.counts.float().mean(dim=-1) / key_blocks
        found["density"] = per_head.tolist()
    for name in ("recall", "kept", "level"):
        tensor = getattr(state, name)
        found[name] = None if tensor is None else tensor.tolist()
    found["clamped_rows"] = None if state.clamped is None else int(state.clamped)
    found["state_bytes"] = state.peak_bytes
    return found


def _lines(summary: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    heads = [
        (recall, kept, level, f"{name}, head {head}")
        for name, layer in layers.items()
        for branch in layer["branches"]
        if branch["recall"] is not None
        for item in zip(branch["recall"], branch["kept"], branch["level"], strict=True)
        for head, (recall, kept, level) in enumerate(zip(*item, strict=True))
    ]
    if not heads:
        return []
    kept = [entry[1] for entry in heads]
    lowest = min(heads, key=lambda entry: entry[1])
    levels = [sum(entry[2] == level for entry in heads) for level in (-1, 0, 1)]
    lines = [
        f"attention mass in the kept blocks, when searched: mean {sum(kept) / len(kept):.3f}, lowest {lowest[1]:.3f} "
        f"({lowest[3]})",
        f"heads: {levels[0]} at a lower sparsity, {levels[1]} at the one asked for, {levels[2]} at a higher one",
        f"searches took {summary['search_seconds']:.2f} s and masks {summary['mask_seconds']:.2f} s of "
        f"{summary['run_seconds']:.2f} s; state {summary['state_bytes'] / 2**20:.1f} MiB",
    ]
    clamped = sum(branch["clamped_rows"] or 0 for layer in layers.values() for branch in layer["branches"])
    if clamped:
        lines.append(f"{clamped} query rows drifted too far from their last search for exact scores")
    return lines
