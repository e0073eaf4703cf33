"""Contenders, checks and targets of block-sparse attention and its searches, against dense attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .. import kernels
from ..kernels.dispatch import get_op
from .baselines import dense_sdpa, heads_first
from .block_sparse_cases import (
    CASES,
    FUSED,
    SEARCH,
    SPARSE,
    SWEEP_NAME,
    USUAL,
    cost,
    make_inputs,
    tokens_of,
)
from .registry import Benchmark, Case, Check, Contender, Inputs, Prepared, Unavailable
from .result import Record, Target

NAME = "block_sparse"
OPS = {SPARSE: "block_sparse_attention", SEARCH: "block_scores", FUSED: "dense_attention_with_scores"}
# Queries whose output, and rows of blocks whose scores, are compared with the definition.
CHECKED, CHECKED_ROWS = 48, 3


def check(case: Case, inputs: Inputs) -> Check:
    """The definition in fp64, and plain PyTorch in the dtype of the inputs, for some queries of two heads."""
    query, key, value = heads_first(*(inputs[name][:, :, [0, -1]] for name in ("query", "key", "value")))
    scale = query.shape[-1] ** -0.5
    if case.shape["what"] == SEARCH:
        return _check_scores(case, query, key, inputs["lse"][:, [0, -1]], scale)
    tokens = tokens_of(case)
    chosen = torch.linspace(0, tokens - 1, CHECKED, device=query.device).long()
    visible = torch.ones((), dtype=torch.bool, device=query.device)
    if case.shape["what"] == SPARSE:
        rows, columns = case.shape["block"]
        kept = inputs["mask"].to_dense()[:, [0, -1]][:, :, chosen // rows]
        visible = kept.repeat_interleave(columns, -1)[..., :tokens]
    query = query[:, :, chosen]
    scores = (query.double() @ key.double().mT * scale).masked_fill(~visible, -torch.inf)
    exact = scores.softmax(-1) @ value.double()
    mask = visible if visible.ndim else None
    yardstick = scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def sample(output: Tensor) -> Tensor:
        return output[:, chosen][:, :, [0, -1]]

    return Check(exact.transpose(1, 2), yardstick.transpose(1, 2), sample)


def _check_scores(case: Case, query: Tensor, key: Tensor, lse: Tensor, scale: float) -> Check:
    rows, columns = case.shape["block"]
    count = -(-tokens_of(case) // rows)
    chosen = sorted({0, count // 2, count - 1})[:CHECKED_ROWS]

    def tiles(query: Tensor, key: Tensor, lse: Tensor) -> Tensor:
        found = []
        for row in chosen:
            some = slice(row * rows, (row + 1) * rows)
            weights = (query[:, :, some] @ key.mT * scale - lse[:, :, some, None]).exp()
            found.append(pad(weights, (0, -weights.shape[-1] % columns)).unflatten(-1, (-1, columns)).sum((-3, -1)))
        return torch.stack(found, 2)

    def sample(output: Tensor) -> Tensor:
        return output[:, [0, -1]][:, :, chosen]

    return Check(tiles(query.double(), key.double(), lse.double()), tiles(query, key, lse), sample)


def contenders(device: torch.device) -> tuple[Contender, ...]:
    ours = [
        Contender(f"attnswap {backend}", "ours", partial(_ours, backend), flops=_executed)
        for backend in get_op(OPS[SPARSE]).implementations
        if backend != "reference" and (backend, device.type) != ("eager", "cuda")
    ]
    # On a GPU the eager road makes its lists on the host; it is for what Triton cannot run.
    same = [Contender("FlexAttention, same blocks", "same", _flex, flops=_executed)] if device.type == "cuda" else []
    dense = [
        replace(contender, flops=_of_dense)
        for contender in dense_sdpa(device)
        if not contender.name.endswith("math")  # it keeps a matrix of tokens x tokens
    ]
    return (*ours, *same, *dense)


def _executed(case: Case) -> float:
    return cost(case, case.dtypes[0]).flops


def _of_dense(case: Case) -> float:
    batch, heads, head_dim = (case.shape[name] for name in ("batch", "heads", "head_dim"))
    return 4.0 * batch * heads * head_dim * tokens_of(case) ** 2


def _ours(backend: str, case: Case, inputs: Inputs) -> Prepared:
    what, block = case.shape["what"], tuple(case.shape["block"])
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    arguments: tuple[Any, ...] = (query, key, value, inputs["mask"]) if what == SPARSE else (query, key, value)
    named: dict[str, Any] = {}
    if what == SEARCH:
        arguments, named = (query, key, inputs["lse"]), {"block": block}
    elif what == FUSED:
        arguments, named = (query, key, value, inputs["lse"]), {"block": block}
    with kernels.use_backend("auto"):
        considered = kernels.explain(OPS[what], *arguments, **named).considered
    verdict = next(entry for entry in considered if entry.backend == backend)
    if not verdict.can:
        raise Unavailable(verdict.reason)
    op: Callable[..., Any] = getattr(kernels, OPS[what])
    return Prepared(
        call=lambda: op(*arguments, **named),
        restore=lambda output: output if isinstance(output, Tensor) else output[0],
        around=lambda: kernels.use_backend(backend),
    )


def _flex(case: Case, inputs: Inputs) -> Prepared:
    if case.shape["what"] != SPARSE:
        raise Unavailable("it gives no scores of blocks")
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    kept = inputs["mask"].to_dense()
    order = kept.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    tokens = tokens_of(case)
    # Whole blocks are never looked into; of partial ones there are none.
    none = torch.zeros_like(kept[..., 0], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(
        none,
        torch.zeros_like(order),
        kept.sum(-1, dtype=torch.int32),
        order,
        BLOCK_SIZE=tuple(case.shape["block"]),
        seq_lengths=(tokens, tokens),
    )
    query, key, value = heads_first(*(inputs[name] for name in ("query", "key", "value")))
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return Prepared(call=lambda: compiled(query, key, value, block_mask=mask), restore=lambda out: out.transpose(1, 2))


# The aims, which a run says whether it met.

CPU_EFFICIENCY, CPU_SEARCH = 0.5, 0.7
GPU_EFFICIENCY, GPU_GOOD, GPU_SEARCH, GPU_FUSED = 0.65, 0.75, 0.6, 1.15
MOST_SHOWN = 4


def targets(records: Sequence[Record], device: Mapping[str, Any]) -> list[Target]:
    if device["type"] != "cuda":
        sweep = [record for record in records if record.case.startswith(SWEEP_NAME)]
        return [
            _at_least(f"speed-up times density at least {CPU_EFFICIENCY} at density {USUAL}", sweep, CPU_EFFICIENCY),
            _at_most(f"a search at most {CPU_SEARCH} of a dense call", records, SEARCH, CPU_SEARCH),
        ]
    return [
        _at_least(f"sparse at least {GPU_EFFICIENCY} of the best dense kernel's rate", records, GPU_EFFICIENCY),
        _at_least(f"sparse at least {GPU_GOOD} of it (good)", records, GPU_GOOD),
        _at_most(f"a search at most {GPU_SEARCH} of a dense call", records, SEARCH, GPU_SEARCH),
        _at_most(f"dense and search at most {GPU_FUSED} of a dense call", records, FUSED, GPU_FUSED),
    ]


def _at_least(aim: str, records: Sequence[Record], least: float) -> Target:
    """The share of what the executed work allows, at the usual density."""
    found = {}
    for record in records:
        ours = record.fastest("ours")
        usual = record.shape["what"] == SPARSE and record.shape["density"] == USUAL
        if ours and usual and (reached := record.reached(ours, ours.flops)):
            found[record.case] = reached
    return _target(aim, found, lambda value: value >= least)


def _at_most(aim: str, records: Sequence[Record], what: str, most: float) -> Target:
    found = {}
    for record in records:
        ours = record.fastest("ours")
        if ours and record.shape["what"] == what and (faster := record.speedup(ours, "dense")):
            found[record.case] = 1 / faster
    return _target(aim, found, lambda value: value <= most)


def _target(aim: str, found: Mapping[str, float], enough: Callable[[float], bool]) -> Target:
    shown = [f"{value:.2f} ({case})" for case, value in sorted(found.items(), key=lambda item: item[1])]
    text = ", ".join(shown) if len(shown) <= MOST_SHOWN else f"{shown[0]} to {shown[-1]}, cases: {len(shown)}"
    return Target(NAME, aim, text or "not measured", all(map(enough, found.values())) if found else None)


BENCHMARK = Benchmark(NAME, CASES, make_inputs, contenders, cost, check, memory=True, targets=targets)
