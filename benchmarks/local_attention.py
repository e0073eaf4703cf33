"""Cases, inputs, contenders and targets of `kernels.local_attention`: a grid after 512 text tokens, as in FLUX."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention, softmax

from .. import kernels
from ..kernels.dispatch import get_op
from ..kernels.local_attention.counts import KEY_TILE, QUERY_TILE, executed_pairs, ideal_pairs
from .baselines import dense_sdpa, flex_attention, heads_first
from .flex_blocks import Tokens, blocks_of
from .growth import exponent
from .ours import prepared
from .registry import Benchmark, Case, Check, Contender, Cost, Inputs, Prepared, Scale
from .result import Record, Target
from .targets import target

NAME = "local_attention"
TEXT = 512
RADII = (8, 16, 32)
POOLING = 4
FLEX = "FlexAttention, same mask"
# Tokens whose output is compared with the reference: the corners of the grid, and so many evenly from first to last.
CHECKED = 60


def _case(
    grid: tuple[int, int], radius: int, heads: int, head_dim: int, *, label: str = "", pooled: bool = False
) -> Case:
    on_gpu = bool(label)
    kind = f"r = {radius}" + (f", {POOLING} x {POOLING} pooled" if pooled else "")
    square = grid[0] == grid[1]
    shape = {
        "batch": 1,
        "text": TEXT,
        "grid": list(grid),
        "radius": radius,
        "pooling": POOLING if pooled else None,
        "heads": heads,
        "head_dim": head_dim,
    }
    return Case(
        label=f"{label or f'{grid[0]} x {grid[1]}'}, {kind}",
        shape={name: value for name, value in shape.items() if value is not None},
        device="cuda" if on_gpu else "cpu",
        dtypes=(torch.bfloat16,) if on_gpu else (torch.float32,),
        quick=grid in QUICK and not pooled,
        # From 64 x 64 up: the smallest grid lies within the largest circle.
        scale=Scale(kind, grid[0] * grid[1], fit_from=64 * 64) if square else None,
    )


def _cpu(grid: tuple[int, int], radius: int, **options: Any) -> Case:
    return _case(grid, radius, 2, 64, **options)


def _flux(side: int, radius: int, **options: Any) -> Case:
    """A layer of FLUX.1: 16 pixels to a token, 24 heads of 128."""
    return _case((side // 16, side // 16), radius, 24, 128, label=f"FLUX, {side} px", **options)


QUICK = ((32, 32), (64, 64))
# Radius by radius and from small to large: dense attention is extrapolated along a series. On a GPU in the order of
# their worth: a time budget cuts from the end.
CASES = (
    *(_cpu((side, side), radius) for radius in RADII for side in (32, 64, 128, 256)),
    _cpu((48, 80), 16),
    *(_cpu((side, side), 8, pooled=True) for side in (64, 128)),
    *(_flux(side, radius) for radius in (16, 8, 32) for side in (1024, 2048, 4096, 8192)),
    *(_flux(side, 8, pooled=True) for side in (1024, 2048, 4096)),
)


def tokens_of(case: Case) -> Tokens:
    height, width = case.shape["grid"]
    cell = case.shape.get("pooling")
    pooled = height // cell * (width // cell) if cell else 0
    return Tokens(case.shape["text"], (height, width), case.shape["radius"], pooled)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Query, key and value `[B, S, H, D]`, and pooled keys and values where the case has them.

    Drawn on the device: for the largest case a CPU would take longer than all that is measured.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tokens = tokens_of(case)
    size = (case.shape["batch"], tokens.queries, case.shape["heads"], case.shape["head_dim"])
    inputs = {
        name: torch.randn(size, generator=generator, dtype=dtype, device=device) for name in ("query", "key", "value")
    }
    if tokens.pooled:
        mean = torch.full((POOLING, POOLING), POOLING**-2, device=device)
        where: dict[str, Any] = {"grid": tokens.grid, "grid_offset": tokens.text}
        inputs |= {f"pooled_{name}": kernels.pool_tokens(inputs[name], mean, **where) for name in ("key", "value")}
    return inputs


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Two products for each pair of a query and a key in sight; all keys and queries read, the output written once."""
    tokens = tokens_of(case)
    pairs = ideal_pairs(tokens.grid, tokens.radius, dense=tokens.text, pooled=tokens.pooled)
    per_token = case.shape["batch"] * case.shape["heads"] * case.shape["head_dim"]
    return Cost(_flops(case, pairs), 2.0 * per_token * (tokens.queries + tokens.keys) * dtype.itemsize)


def _flops(case: Case, pairs: int) -> float:
    return 4.0 * case.shape["batch"] * case.shape["heads"] * case.shape["head_dim"] * pairs


def _of_backend(backend: str, case: Case) -> float:
    tokens = tokens_of(case)
    around = {"dense": tokens.text, "pooled": tokens.pooled}
    return _flops(case, executed_pairs(backend, tokens.grid, tokens.radius, **around, tiles=_tiles(case)))


def _tiles(case: Case) -> tuple[tuple[int, int], tuple[int, int]]:
    """Those of the Triton kernel on this GPU; without one the largest, which the expected work is of."""
    if case.device != "cuda" or not torch.cuda.is_available():
        return QUERY_TILE, KEY_TILE
    from ..kernels.local_attention import triton

    target = triton.target_of(torch.device(case.device))
    config, _ = triton.configuration(target, case.dtypes[0].itemsize, case.shape["head_dim"], masked=False)
    return triton.TILES[config.block_m], triton.TILES[config.block_n]


def _of_flex(case: Case) -> float:
    return _flops(case, blocks_of(tokens_of(case), torch.device(case.device)).pairs)


def _of_dense(case: Case) -> float:
    return _flops(case, tokens_of(case).queries ** 2)


def checked(case: Case) -> torch.Tensor:
    """Indices of the tokens whose output is compared."""
    tokens = tokens_of(case)
    height, width = tokens.grid
    corners = [tokens.text + y * width + x for y in (0, height - 1) for x in (0, width - 1)]
    spread = torch.linspace(0, tokens.queries - 1, CHECKED).long().tolist()
    return torch.tensor(sorted({*corners, *spread}))


def check(case: Case, inputs: Inputs) -> Check:
    """The definition in fp64, and masked SDPA in the dtype of the inputs, for some tokens of two heads."""
    tokens, chosen = tokens_of(case), checked(case)
    device = inputs["query"].device

    def sample(output: torch.Tensor) -> torch.Tensor:
        return output[:, chosen.to(device)][:, :, [0, -1]]

    query = sample(inputs["query"])
    key, value = (
        torch.cat([inputs[x][:, :, [0, -1]] for x in (name, f"pooled_{name}") if x in inputs], dim=1)
        for name in ("key", "value")
    )
    visible = tokens.visible(chosen[:, None], torch.arange(tokens.keys)).to(device)
    query, key, value = heads_first(query, key, value)
    scores = query.double() @ key.double().mT * query.shape[-1] ** -0.5
    exact = softmax(scores.masked_fill(~visible, -torch.inf), dim=-1) @ value.double()
    yardstick = scaled_dot_product_attention(query, key, value, attn_mask=visible)
    return Check(exact.transpose(1, 2), yardstick.transpose(1, 2), sample)


def contenders(device: torch.device) -> tuple[Contender, ...]:
    ours = [
        Contender(
            f"attnswap {backend}",
            "ours",
            partial(_ours, backend),
            # On a GPU the eager road is there for what Triton cannot run, and may be too slow for the largest cases;
            # it cuts the grid otherwise there than on a CPU, where its work is counted.
            order=1 if backend == "eager" and device.type == "cuda" else None,
            flops=None if backend == "eager" and device.type == "cuda" else partial(_of_backend, backend),
        )
        for backend in get_op(NAME).implementations
        if backend != "reference"
    ]
    # A block of 128 tokens in a row: as the grid widens, a query's share of the blocks grows with its width.
    same = Contender(FLEX, "same", _flex, order=1.5, flops=_of_flex)
    dense = [
        replace(contender, order=2, flops=_of_dense)
        for contender in dense_sdpa(device)
        # The math backend keeps a matrix of tokens x tokens: no alternative at these sizes.
        if not contender.name.endswith("math")
    ]
    return (*ours, same, *dense)


def _arguments(case: Case, inputs: Inputs) -> dict[str, Any]:
    tokens = tokens_of(case)
    return {**inputs, "grid": tokens.grid, "grid_offset": tokens.text, "radius": tokens.radius}


def _ours(backend: str, case: Case, inputs: Inputs) -> Prepared:
    return prepared(NAME, backend, _arguments(case, inputs))


def _flex(case: Case, inputs: Inputs) -> Prepared:
    tokens, device = tokens_of(case), inputs["query"].device
    mask_mod = tokens.mask_mod(device)
    keys = {
        name: torch.cat([inputs[x] for x in (name, f"pooled_{name}") if x in inputs], dim=1)
        for name in ("key", "value")
    }
    block_mask = blocks_of(tokens, torch.device(device.type)).block_mask(mask_mod, device)
    return flex_attention({"query": inputs["query"], **keys}, mask_mod, block_mask)


# The aims, which a run says whether it met.

# TFLOP a layer of FLUX that 8 x 16 queries against 8 x 8 keys execute, worked out from the geometry beforehand.
EXPECTED_TFLOP = {
    (1024, 8): 0.086, (1024, 16): 0.123, (1024, 32): 0.198,
    (2048, 8): 0.348, (2048, 16): 0.537, (2048, 32): 1.03,
    (4096, 8): 1.42, (4096, 16): 2.25, (4096, 32): 4.66,
    (8192, 8): 5.65, (8192, 16): 9.01, (8192, 32): 18.6,
}  # fmt: skip
TOLERATED = 0.10
REACHED = 0.6
LINEAR = 1.1
H200_MS = 26.0

_target = partial(target, NAME)


def targets(records: Sequence[Record], device: Mapping[str, Any]) -> list[Target]:
    """Said of the cases without pooled keys."""
    plain = [record for record in records if "pooling" not in record.shape]
    return _gpu_targets(plain, str(device["name"])) if device["type"] == "cuda" else _cpu_targets(plain)


def _cpu_targets(records: Sequence[Record]) -> list[Target]:
    sizes = [case for case in CASES if case.device == "cpu" and case.shape["radius"] == 8]
    sizes = [case for case in sizes if min(case.shape["grid"]) >= 64 and "pooling" not in case.shape]
    reached = {
        f"r = {record.shape['radius']}": share
        for record in records
        if record.shape["grid"] == [128, 128]
        and (ours := record.fastest("ours"))
        and (share := record.reached(ours, ours.flops))
    }
    memory = _memory_exponents(records)
    return [
        _faster("faster than dense SDPA from 64 x 64 up at r = 8", "dense", sizes, records),
        _target(
            f"at 128 x 128 at least {REACHED} of the speed-up that the executed work allows",
            reached,
            "{:.2f}",
            lambda found: found >= REACHED,
        ),
        _target("memory linear in the tokens", memory, "tokens ^ {:.2f}", lambda found: found <= LINEAR),
    ]


def _gpu_targets(records: Sequence[Record], device: str) -> list[Target]:
    work: dict[str, float] = {}
    layer: dict[str, float] = {}
    for record in records:
        side, radius = record.shape["grid"][0] * 16, record.shape["radius"]
        triton = next((m for m in record.measurements if m.contender == "attnswap triton"), None)
        if triton and triton.flops:
            work[record.case] = triton.flops / (EXPECTED_TFLOP[side, radius] * 1e12)
        ours = record.fastest("ours")
        if ours and ours.median_ms and (side, radius) == (8192, 16) and "H200" in device:
            layer[record.case] = ours.median_ms
    sizes = [case for case in CASES if case.device == "cuda" and "pooling" not in case.shape]
    aims = [
        _target("executed work within 10% of the expected", work, "{:.2f}", lambda x: abs(x - 1) <= TOLERATED),
        _faster("ahead of FlexAttention at every size", "same", sizes, records),
    ]
    if "H200" in device:
        aims.append(
            _target(f"8192 px, r = 16: at most {H200_MS:g} ms on an H200", layer, "{:.1f} ms", lambda x: x <= H200_MS)
        )
    return aims


def _faster(aim: str, role: str, sizes: Iterable[Case], records: Sequence[Record]) -> Target:
    """Missed where one size is slower; else open until all of them were measured, or were too slow for `role`."""
    wanted = {_size(case) for case in sizes}
    timed: set[tuple[int, ...]] = set()
    found: dict[str, float] = {}
    for record in records:
        ours = record.fastest("ours")
        if ours is None or _size(record) not in wanted:
            continue
        if speedup := record.speedup(ours, role):
            found[record.case] = speedup
        if speedup or any(m.role == role and m.extrapolated_ms for m in record.measurements):
            timed.add(_size(record))
    ahead = _target(aim, found, "{:.2f}x", lambda speedup: speedup > 1)
    return replace(ahead, met=None) if ahead.met and timed != wanted else ahead


def _size(of: Case | Record) -> tuple[int, ...]:
    return *of.shape["grid"], of.shape["radius"]


def _memory_exponents(records: Sequence[Record]) -> dict[str, float]:
    points: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        ours = record.fastest("ours")
        if record.series and record.size and record.size >= record.fit_from and ours and ours.peak_bytes:
            points.setdefault(record.series, []).append((record.size, ours.peak_bytes))
    return {series: exponent(found) for series, found in points.items() if len(found) > 1}


BENCHMARK = Benchmark(NAME, CASES, make_inputs, contenders, cost, check, memory=True, targets=targets)
