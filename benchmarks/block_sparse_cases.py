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
SPARSE, SEARCH, FUSED = "sparse attention", "search", "dense and search"
DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
USUAL = 0.2
#: A density of its own for each third of the heads, as much work in all as `USUAL`.
MIXED, THIRDS = "mixed", (0.1, 0.2, 0.3)
LSE_SHIFT = 0.5


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
    call: str = SPARSE,
    on_gpu: bool = False,
    quick: bool = False,
) -> Case:
    density_in_words = "mixed densities" if density == MIXED else f"density {density}"
    blocks = "" if block == (64, 64) else f", blocks {block[0]} x {block[1]}"
    shape = {
        "call": call,
        "batch": batch,
        "grid": list(grid),
        "text": text or None,
        "heads": heads,
        "head_dim": head_dim,
        "density": density if call == SPARSE else None,
        "block": list(block),
    }
    return Case(
        label=f"{name}, {density_in_words if call == SPARSE else call}{blocks}",
        shape={key: value for key, value in shape.items() if value is not None},
        device="cuda" if on_gpu else "cpu",
        dtypes=(torch.bfloat16,) if on_gpu else (torch.float32,),
        quick=quick,
    )


def _gpu(shape: tuple[str, dict[str, Any]], **changes: Any) -> Case:
    return _case(shape[0], on_gpu=True, **{**shape[1], **changes})


SWEEP: Any = {"grid": (8, 32, 32), "heads": 6, "head_dim": 64}
SWEEP_NAME = "8192 tokens, 6 heads of 64"
# The four models' shapes with fewer frames and heads: about 8K tokens.
SMALL: tuple[tuple[str, Any], ...] = (
    ("Wan 1.3B, 7800 tokens", {"grid": (5, 30, 52), "heads": 3, "head_dim": 128}),
    ("Wan 14B, 8640 tokens", {"grid": (4, 27, 80), "heads": 2, "head_dim": 128}),
    ("HunyuanVideo, 8100 + 256 tokens", {"grid": (3, 45, 60), "text": 256, "heads": 2, "head_dim": 128}),
    ("CogVideoX 1.5, 8256 + 226 tokens", {"grid": (4, 48, 43), "text": 226, "heads": 4, "head_dim": 64}),
)
# As they are at 720p or 480p, 81 to 161 frames.
HUNYUAN = ("HunyuanVideo 720p", {"grid": (33, 45, 80), "text": 256, "heads": 24, "head_dim": 128})
WAN_14B = ("Wan 14B 720p", {"grid": (21, 45, 80), "heads": 40, "head_dim": 128})
WAN_1_3B = ("Wan 1.3B 480p", {"grid": (21, 30, 52), "heads": 12, "head_dim": 128})
COGVIDEOX = ("CogVideoX 1.5", {"grid": (21, 48, 85), "text": 226, "heads": 48, "head_dim": 64, "batch": 2})
# Shapes and densities that others publish figures for.
PUBLISHED = (
    ("sliding tiles' shape", {"grid": (30, 48, 80), "heads": 24, "head_dim": 128, "density": 0.09}),
    ("VSA's shape", {"grid": (12, 64, 64), "heads": 12, "head_dim": 128, "density": 0.1}),
    ("SLA's shape", {"grid": (21, 30, 52), "heads": 16, "head_dim": 128, "batch": 2, "density": 0.05}),
)
BLOCKS = ((64, 64), (128, 64), (128, 128))

# On a GPU in the order of their worth: a time budget cuts from the end.
CASES = (
    *(_case(SWEEP_NAME, density=d, quick=d in (USUAL, 1.0), **SWEEP) for d in (*DENSITIES, MIXED)),
    *(_case(SWEEP_NAME, call=call, quick=call == SEARCH, **SWEEP) for call in (SEARCH, FUSED)),
    *(_case(name, call=call, **shape) for name, shape in SMALL for call in (SPARSE, SEARCH, FUSED)),
    _gpu(HUNYUAN),
    _gpu(WAN_14B),
    *(_gpu(shape, call=call) for shape in (HUNYUAN, WAN_14B) for call in (SEARCH, FUSED)),
    _gpu(HUNYUAN, density=1.0),
    _gpu(WAN_14B, density=1.0),
    _gpu(HUNYUAN, density=MIXED),
    _gpu(HUNYUAN, block=(128, 64)),
    *(_gpu(shape, density=0.1) for shape in (HUNYUAN, WAN_14B)),
    *(
        _gpu(shape, call=call, quick=shape is WAN_1_3B and call != FUSED)
        for shape in (WAN_1_3B, COGVIDEOX)
        for call in (SPARSE, SEARCH, FUSED)
    ),
    *(_gpu(shape, density=density) for density in (1.0, 0.1) for shape in (WAN_1_3B, COGVIDEOX)),
    *(_gpu(shape, block=block) for shape in PUBLISHED for block in BLOCKS),
    *(_gpu(shape, density=density) for density in (0.3, 0.5, 0.15, 0.05) for shape in (HUNYUAN, WAN_14B)),
)


def tokens_of(case: Case) -> int:
    """Those of the video, then those of the text."""
    return _video(case) + case.shape.get("text", 0)


def _video(case: Case) -> int:
    return math.prod(case.shape["grid"])


def densities_of(case: Case) -> list[float]:
    """The share of the video's key blocks that each head keeps."""
    density, heads = case.shape["density"], case.shape["heads"]
    return [THIRDS[head * len(THIRDS) // heads] if density == MIXED else density for head in range(heads)]


def pairs_of(case: Case) -> float:
    """Query-key pairs in the blocks of a mask, over all heads of an item.

    From the first block with text on, every row keeps every block, and every other row keeps these blocks. Without
    text the last block may be shorter; whether a row keeps it depends on the scores, so that all count as the mean.
    """
    tokens, video = tokens_of(case), _video(case)
    queries, keys = (video // side * side if tokens > video else tokens for side in case.shape["block"])
    blocks = -(-keys // case.shape["block"][1])
    shares = [kept_blocks(1 - density, blocks) / blocks for density in densities_of(case)]
    return sum(queries * (share * keys + tokens - keys) + (tokens - queries) * tokens for share in shares)


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Two products for each pair that is computed, one for each where values take no part; all read, output written
    once."""
    call, tokens = case.shape["call"], tokens_of(case)
    batch, heads, head_dim = (case.shape[name] for name in ("batch", "heads", "head_dim"))
    pairs = pairs_of(case) if call == SPARSE else heads * tokens**2
    per_pair, tensors = (2.0, 2) if call == SEARCH else (4.0, 4)
    return Cost(
        per_pair * batch * head_dim * pairs, float(tensors) * batch * tokens * heads * head_dim * dtype.itemsize
    )


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Query, key and value `[B, S, H, D]`; the mask of a search in them, or the log-sum-exp that a search starts from.

    On a GPU tensors and masks are random: what is timed does not depend on what they hold, and a search would take a
    kernel that is to be measured.
    """
    if device.type == "cpu":
        heads, head_dim = case.shape["heads"], case.shape["head_dim"]
        structured = Structured(tuple(case.shape["grid"]), heads, head_dim, case.shape.get("text", 0))
        query, key, value = structured.tensors(dtype=dtype)
    else:
        generator = torch.Generator(device).manual_seed(seed)
        size = (case.shape["batch"], tokens_of(case), case.shape["heads"], case.shape["head_dim"])
        query, key, value = (torch.randn(size, generator=generator, dtype=dtype, device=device) for _ in range(3))
    tensors = {"query": query, "key": key, "value": value}
    if case.shape["call"] == SPARSE:
        return {**tensors, "mask": _mask(case, query, key, seed)}
    _, lse = kernels.dense_attention(query, key, value, return_lse=True)
    # As a step before would have left it.
    return {**tensors, "lse": lse - LSE_SHIFT}


def _mask(case: Case, query: Tensor, key: Tensor, seed: int) -> BlockMask:
    """By the scores of a search, on a GPU by random ones."""
    block, tokens, video = tuple(case.shape["block"]), tokens_of(case), _video(case)
    if query.device.type == "cpu":
        scores, _ = kernels.block_scores(query, key, None, block=block)
    else:
        generator = torch.Generator(query.device).manual_seed(seed)
        size = (case.shape["batch"], case.shape["heads"], *(-(-tokens // side) for side in block))
        scores = torch.rand(size, generator=generator, device=query.device)
    densities = densities_of(case)
    kept = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for density in set(densities):
        heads = [head for head, own in enumerate(densities) if own == density]
        found = kernels.select_blocks(
            scores[:, heads],
            sparsity=1 - density,
            block=block,
            text=((video, tokens),) if tokens > video else (),
            head_adaptive=False,
        )
        kept[:, heads] = found.mask.to_dense()
    return BlockMask.from_dense(kept, block)
