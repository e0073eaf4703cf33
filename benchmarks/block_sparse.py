"""Contenders, checks and targets of block-sparse attention and its searches, against dense attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .. import kernels
from ..kernels.dispatch import get_op
from .baselines import dense_sdpa, flex_attention, heads_first
from .block_sparse_cases import CASES, FUSED, SEARCH, SPARSE, SWEEP_NAME, USUAL, cost, make_inputs, tokens_of
from .ours import prepared
from .registry import Benchmark, Case, Check, Contender, Inputs, Prepared, Unavailable
from .result import Record, Target
from .targets import target

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

NAME = "block_sparse"
OPS = {SPARSE: "block_sparse_attention", SEARCH: "block_scores", FUSED: "dense_attention_with_scores"}
FLEX = "FlexAttention, same blocks"
# Queries whose output is compared with the definition.
CHECKED = 48


def check(case: Case, inputs: Inputs) -> Check:
    """The definition in fp64, and plain PyTorch in the dtype of the inputs, of some outputs and scores of two heads.

    What is checked of a call comes as a tuple: the output, unless it is a search alone, and the scores of a search.
    """
    call, parts = case.shape["call"], []
    if call != SEARCH:
        parts.append(_check_output(case, inputs))
    if call != SPARSE:
        parts.append(_check_scores(case, inputs))
    # Scores are other numbers than outputs: each part counts as much as the other, scaled without rounding.
    scales = [2.0 ** -math.frexp(float(part.exact.norm()))[1] for part in parts]

    def together(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([(tensor * scale).flatten() for tensor, scale in zip(tensors, scales, strict=True)])

    return Check(
        together([part.exact for part in parts]),
        together([part.yardstick for part in parts]),
        lambda outputs: together([part.sample(output) for part, output in zip(parts, outputs, strict=True)]),
    )


def _check_output(case: Case, inputs: Inputs) -> Check:
    query, key, value = heads_first(*(inputs[name][:, :, [0, -1]] for name in ("query", "key", "value")))
    tokens = tokens_of(case)
    chosen = torch.linspace(0, tokens - 1, CHECKED, device=query.device).long()
    visible = torch.ones((1, 1, CHECKED, tokens), dtype=torch.bool, device=query.device)
    if case.shape["call"] == SPARSE:
        rows, columns = case.shape["block"]
        kept = inputs["mask"].to_dense()[:, [0, -1]][:, :, chosen // rows]
        visible = kept.repeat_interleave(columns, -1)[..., :tokens]
    query = query[:, :, chosen]
    scores = query.double() @ key.double().mT * query.shape[-1] ** -0.5
    exact = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value.double()
    yardstick = scaled_dot_product_attention(query, key, value, attn_mask=visible)

    def sample(output: Tensor) -> Tensor:
        return output[:, chosen][:, :, [0, -1]]

    return Check(exact.transpose(1, 2), yardstick.transpose(1, 2), sample)


def _check_scores(case: Case, inputs: Inputs) -> Check:
    """Of the first, the middle and the last row of blocks."""
    query, key = (inputs[name][:, :, [0, -1]].transpose(1, 2) for name in ("query", "key"))
    reference, scale = inputs["lse"][:, [0, -1]], query.shape[-1] ** -0.5
    rows, columns = case.shape["block"]
    last = (tokens_of(case) - 1) // rows
    chosen = sorted({0, last // 2, last})

    def tiles(query: Tensor, key: Tensor, reference: Tensor) -> Tensor:
        found = []
        for row in chosen:
            some = slice(row * rows, (row + 1) * rows)
            weights = (query[:, :, some] @ key.mT * scale - reference[:, :, some, None]).exp()
            found.append(pad(weights, (0, -weights.shape[-1] % columns)).unflatten(-1, (-1, columns)).sum((-3, -1)))
        return torch.stack(found, 2)

    def sample(scores: Tensor) -> Tensor:
        return scores[:, [0, -1]][:, :, chosen]

    return Check(tiles(query.double(), key.double(), reference.double()), tiles(query, key, reference), sample)


def contenders(device: torch.device) -> tuple[Contender, ...]:
    on_gpu = device.type == "cuda"
    backends = [backend for backend in get_op(OPS[SPARSE]).implementations if backend != "reference"]
    if on_gpu:
        # Its lists of blocks are made on the host; on a GPU it is for what Triton cannot run.
        backends.remove("eager")
    ours = [Contender(f"attnswap {backend}", "ours", partial(_ours, backend), flops=_executed) for backend in backends]
    same = [Contender(FLEX, "same", _flex, flops=_executed)] if on_gpu else []
    # The math backend keeps a matrix of tokens x tokens. On a GPU the memory-efficient kernel is never the fastest
    # for bf16, and a round of the largest case would take twice as long with it.
    dense = [
        replace(contender, flops=_of_dense)
        for contender in dense_sdpa(device)
        if not contender.name.endswith(("math", "efficient"))
    ]
    return (*ours, *same, *dense)


def _executed(case: Case) -> float:
    return cost(case, case.dtypes[0]).flops


def _of_dense(case: Case) -> float:
    batch, heads, head_dim = (case.shape[name] for name in ("batch", "heads", "head_dim"))
    return 4.0 * batch * heads * head_dim * tokens_of(case) ** 2


def _ours(backend: str, case: Case, inputs: Inputs) -> Prepared:
    call, block = case.shape["call"], tuple(case.shape["block"])
    if call == SPARSE:
        return prepared(OPS[call], backend, inputs, lambda output: (output,))
    if call == SEARCH:
        arguments = {name: inputs[name] for name in ("query", "key", "lse")}
        return prepared(OPS[call], backend, {**arguments, "block": block}, lambda found: found[:1])
    arguments = {name: inputs[name] for name in ("query", "key", "value")}
    return prepared(OPS[call], backend, {**arguments, "lse_ref": inputs["lse"], "block": block}, lambda f: f[::2])


def _flex(case: Case, inputs: Inputs) -> Prepared:
    if case.shape["call"] != SPARSE:
        raise Unavailable("it gives no scores of blocks")
    rows, columns = case.shape["block"]
    # Tiles within our blocks: those it takes by itself may be larger, which it refuses.
    options = {"BLOCK_M": rows, "BLOCK_N": min(columns, 64), "num_warps": 8 if rows == 128 else 4}
    ready = flex_attention(inputs, None, flex_mask(inputs["mask"], tokens_of(case)), options)
    return replace(ready, restore=lambda output: (ready.restore(output),))


def flex_mask(mask: kernels.BlockMask, tokens: int) -> BlockMask:
    """A mask for FlexAttention, which takes its blocks for whole ones and looks into none."""
    from torch.nn.attention.flex_attention import BlockMask

    kept = mask.to_dense()
    order = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    none = torch.zeros_like(mask.counts)
    return BlockMask.from_kv_blocks(
        *(none, torch.zeros_like(order), mask.counts, order), BLOCK_SIZE=mask.block, seq_lengths=(tokens, tokens)
    )


# The aims, which a run says whether it met.

CPU_EFFICIENCY, CPU_SEARCH = 0.5, 0.7
GPU_EFFICIENCY, GPU_GOOD, GPU_SEARCH, GPU_FUSED = 0.65, 0.75, 0.6, 1.15


def targets(records: Sequence[Record], device: Mapping[str, Any]) -> list[Target]:
    """Efficiency is the speed-up over the fastest dense attention, times the share of its work that is executed."""
    if device["type"] != "cuda":
        sweep = [record for record in records if record.case.startswith(SWEEP_NAME)]
        return [
            _at_least(f"speed-up times density at least {CPU_EFFICIENCY} at density {USUAL}", sweep, CPU_EFFICIENCY),
            _at_most(f"a search at most {CPU_SEARCH} of a dense call", records, SEARCH, CPU_SEARCH),
        ]
    return [
        _at_least(
            f"at density {USUAL} at least {GPU_EFFICIENCY} of the best dense kernel's rate", records, GPU_EFFICIENCY
        ),
        _at_least(f"at least {GPU_GOOD} of it (good)", records, GPU_GOOD),
        _at_most(f"a search at most {GPU_SEARCH} of a dense call", records, SEARCH, GPU_SEARCH),
        _at_most(f"dense attention with a search at most {GPU_FUSED} of a dense call", records, FUSED, GPU_FUSED),
    ]


def _at_least(aim: str, records: Sequence[Record], least: float) -> Target:
    def efficiency(record: Record) -> float | None:
        ours = record.fastest("ours")
        usual = record.shape["call"] == SPARSE and record.shape["density"] == USUAL
        return record.reached(ours, ours.flops) if ours and usual else None

    return target(NAME, aim, _found(records, efficiency), "{:.2f}", lambda value: value >= least)


def _at_most(aim: str, records: Sequence[Record], call: str, most: float) -> Target:
    def of_dense(record: Record) -> float | None:
        ours, dense = record.fastest("ours"), record.fastest("dense")
        if record.shape["call"] != call or ours is None or dense is None or not (ours.median_ms and dense.median_ms):
            return None
        return ours.median_ms / dense.median_ms

    return target(NAME, aim, _found(records, of_dense), "{:.2f}", lambda value: value <= most)


def _found(records: Sequence[Record], number: Callable[[Record], float | None]) -> dict[str, float]:
    return {record.case: value for record in records if (value := number(record)) is not None}


BENCHMARK = Benchmark(NAME, CASES, make_inputs, contenders, cost, check, memory=True, targets=targets)
