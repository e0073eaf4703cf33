"""Cases and inputs of `kernels.block_sparse_attention` and of the searches that make its masks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..kernels import BlockMask
from ..kernels.block_sparse.selection import kept_blocks
from .registry import Case, Cost, Inputs
from .structured import Structured

# What a case times: sparse attention by a mask; a search with the log-sum-exp of a step before; dense attention and
# the search in one.
SPARSE, SEARCH, FUSED = "sparse", "search", "dense and search"
#: Shares of the key blocks that a third of the heads keep each.
MIXED = (0.1, 0.2, 0.3)
DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
USUAL = 0.2


def _case(
    name: str,
    grid: tuple[int, int, int],
    *,
    heads: int,
    head_dim: int,
    text: int = 0,
    batch: int = 1,
    density: float | str = USUAL,
    block: tuple[int, int] = (64, 64),
    what: str = SPARSE,
    device: str = "cpu",
    quick: bool = False,
) -> Case:
    kind = what if what != SPARSE else f"density {density}"
    blocks = "" if block == (64, 64) else f", blocks {block[0]} x {block[1]}"
    shape = {
        "what": what,
        "batch": batch,
        "grid": list(grid),
        "text": text,
        "heads": heads,
        "head_dim": head_dim,
        "density": density if what == SPARSE else None,
        "block": list(block),
    }
    return Case(
        label=f"{name}, {kind}{blocks}",
        shape={key: value for key, value in shape.items() if value is not None},
        device="cuda" if device == "cuda" else "cpu",
        dtypes=(torch.bfloat16,) if device == "cuda" else (torch.float32,),
        quick=quick,
    )


def _all(name: str, densities: tuple[Any, ...], **shape: Any) -> list[Case]:
    return [_case(name, density=density, **shape) for density in densities] + [
        _case(name, what=what, **shape) for what in (SEARCH, FUSED)
    ]


# The four models' shapes with fewer frames and heads: about 8K tokens.
SMALL = (
    ("Wan 1.3B, 7800 tokens", {"grid": (5, 30, 52), "heads": 3, "head_dim": 128}),
    ("Wan 14B, 8640 tokens", {"grid": (4, 27, 80), "heads": 2, "head_dim": 128}),
    ("HunyuanVideo, 8100 + 256 tokens", {"grid": (3, 45, 60), "text": 256, "heads": 2, "head_dim": 128}),
    ("CogVideoX 1.5, 8160 + 226 tokens", {"grid": (4, 48, 43), "text": 226, "heads": 4, "head_dim": 64}),
)
# As they are at 720p or 480p, 81 to 161 frames.
LARGE = (
    ("HunyuanVideo 720p", {"grid": (33, 45, 80), "text": 256, "heads": 24, "head_dim": 128}),
    ("Wan 14B 720p", {"grid": (21, 45, 80), "heads": 40, "head_dim": 128}),
    ("Wan 1.3B 480p", {"grid": (21, 30, 52), "heads": 12, "head_dim": 128}),
    ("CogVideoX 1.5", {"grid": (21, 48, 85), "text": 226, "heads": 48, "head_dim": 64, "batch": 2}),
)
# Shapes that others publish figures for, with masks at random.
PUBLISHED = (
    ("sliding tiles' shape", {"grid": (30, 48, 80), "heads": 24, "head_dim": 128, "density": 0.09}),
    ("VSA's shape", {"grid": (12, 64, 64), "heads": 12, "head_dim": 128, "density": 0.1}),
    ("SLA's shape", {"grid": (21, 30, 52), "heads": 16, "head_dim": 128, "batch": 2, "density": 0.05}),
)
SWEEP = {"grid": (8, 32, 32), "heads": 6, "head_dim": 64}
SWEEP_NAME = "8192 tokens, 6 heads of 64"

# On a GPU in the order of their worth: a time budget cuts from the end.
CASES = (
    *(_case(SWEEP_NAME, density=d, quick=d in (USUAL, 1.0), **SWEEP) for d in (*DENSITIES, "mixed")),
    *(_case(SWEEP_NAME, what=what, quick=what == SEARCH, **SWEEP) for what in (SEARCH, FUSED)),
    *(case for name, shape in SMALL for case in _all(name, (USUAL,), **shape)),
    *(case for name, shape in LARGE for case in _all(name, (0.1, USUAL, 1.0), device="cuda", **shape)),
    _case(LARGE[0][0], density="mixed", device="cuda", **LARGE[0][1]),
    *(
        _case(name, block=block, device="cuda", **shape)
        for name, shape in PUBLISHED
        for block in ((64, 64), (128, 64), (128, 128))
    ),
    *(
        _case(name, density=density, device="cuda", **shape)
        for name, shape in LARGE[:2]
        for density in (0.05, 0.15, 0.3, 0.5)
    ),
)


def tokens_of(case: Case) -> int:
    return math.prod(case.shape["grid"]) + case.shape["text"]


def densities_of(case: Case) -> list[float]:
    """Of each head."""
    density, heads = case.shape["density"], case.shape["heads"]
    return [MIXED[head * len(MIXED) // heads] if density == "mixed" else density for head in range(heads)]


def blocks_of(case: Case) -> tuple[int, int, int, int]:
    """Query and key blocks, and those of each that hold text."""
    tokens, video = tokens_of(case), math.prod(case.shape["grid"])
    sides = case.shape["block"]
    rows, columns = (-(-tokens // side) for side in sides)
    text = [(-(-tokens // side) - video // side) if case.shape["text"] else 0 for side in sides]
    return rows, columns, text[0], text[1]


def pairs(case: Case) -> int:
    """Query-key pairs in the blocks of a mask, over all heads of an item; the last blocks count as whole."""
    rows, columns, text_rows, text_columns = blocks_of(case)
    video = columns - text_columns
    kept = [kept_blocks(1 - density, video) + text_columns for density in densities_of(case)]
    blocks = sum((rows - text_rows) * count + text_rows * columns for count in kept)
    return int(blocks * tokens_of(case) ** 2 / (rows * columns))


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Two products for each pair that is computed, one for each where values take no part; all read, output written
    once."""
    what, tokens = case.shape["what"], tokens_of(case)
    batch, heads, head_dim = (case.shape[name] for name in ("batch", "heads", "head_dim"))
    per_pair = {SPARSE: 4.0, SEARCH: 2.0, FUSED: 4.0}[what] * head_dim
    computed = pairs(case) if what == SPARSE else heads * tokens**2
    tensors = 2 if what == SEARCH else 4
    return Cost(batch * per_pair * computed, float(tensors) * batch * tokens * heads * head_dim * dtype.itemsize)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Query, key and value `[B, S, H, D]`; the mask of a search in them, or the log-sum-exp that a search starts from.

    On a GPU tensors and masks are random: what is timed does not depend on what they hold, and a search would take a
    kernel that is to be measured.
    """
    if device.type == "cpu":
        shape = Structured(tuple(case.shape["grid"]), case.shape["heads"], case.shape["head_dim"], case.shape["text"])
        query, key, value = shape.tensors(dtype=dtype, device=device)
    else:
        generator = torch.Generator(device).manual_seed(seed)
        size = (case.shape["batch"], tokens_of(case), case.shape["heads"], case.shape["head_dim"])
        query, key, value = (torch.randn(size, generator=generator, dtype=dtype, device=device) for _ in range(3))
    tensors: dict[str, Any] = {"query": query, "key": key, "value": value}
    if case.shape["what"] != SPARSE:
        _, lse = kernels.dense_attention(query, key, value, return_lse=True)
        # As a step before would have left it.
        return tensors | {"lse": lse - 0.5}
    return tensors | {"mask": _mask(case, query, key, seed)}


def _mask(case: Case, query: Tensor, key: Tensor, seed: int) -> BlockMask:
    """By the scores of a search, on a GPU by random ones."""
    rows, columns, _, _ = blocks_of(case)
    block = tuple(case.shape["block"])
    if query.device.type == "cpu":
        scores, _ = kernels.block_scores(query, key, None, block=block)
    else:
        generator = torch.Generator(query.device).manual_seed(seed)
        size = (case.shape["batch"], case.shape["heads"], rows, columns)
        scores = torch.rand(size, generator=generator, device=query.device)
    video, tokens = math.prod(case.shape["grid"]), tokens_of(case)
    text = ((video, tokens),) if tokens > video else ()
    kept = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for density in set(densities_of(case)):
        heads = [head for head, own in enumerate(densities_of(case)) if own == density]
        found = kernels.select_blocks(
            scores[:, heads], sparsity=1 - density, block=block, text=text, head_adaptive=False
        )
        kept[:, heads] = found.mask.to_dense()
    return BlockMask.from_dense(kept, block)
