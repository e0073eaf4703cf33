"""Cases, inputs and contenders of `kernels.window_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .. import kernels
from ..kernels.dispatch import get_op
from .baselines import SDPA_BACKENDS, dense_sdpa, flex_attention, heads_first
from .ours import prepared
from .registry import Benchmark, Case, Check, Contender, Cost, Inputs, Prepared

NAME = "window_attention"
FP32, FP16, BF16 = (torch.float32,), (torch.float16,), (torch.bfloat16,)


def _case(
    label: str, side: tuple[int, int], heads: int, head_dim: int, device: str, dtypes: tuple[torch.dtype, ...]
) -> Case:
    """Guidance batch of 2, 2 x 2 windows, shifted by a quarter window: three of HiDiffusion's four draws shift."""
    height, width = side
    shape = {
        "batch": 2,
        "heads": heads,
        "head_dim": head_dim,
        "grid": [height, width],
        "windows": [2, 2],
        "shift": [-(-height // 2) // 4, -(-width // 2) // 4],
    }
    return Case(label, shape, "cuda" if device == "cuda" else "cpu", dtypes, quick=label in QUICK)


QUICK = ("SD 1.5, 256 px", "odd grid 33 x 25", "SD 1.5, 1024 px", "SDXL 2048 px, pooled level")
# In the order of their worth: a time budget cuts from the end.
CASES = (
    _case("SD 1.5, 256 px", (32, 32), 8, 40, "cpu", FP32 + BF16),
    _case("SD 1.5, 512 px", (64, 64), 8, 40, "cpu", FP32 + BF16),
    _case("SDXL 1024 px", (64, 64), 10, 64, "cpu", FP32),
    _case("odd grid 33 x 25", (33, 25), 10, 64, "cpu", FP32),
    _case("SD 1.5, 1024 px", (128, 128), 8, 40, "cuda", BF16 + FP16),
    _case("SDXL 2048 px", (128, 128), 10, 64, "cuda", BF16 + FP16),
    _case("SDXL 2048 px, pooled level", (64, 64), 10, 64, "cuda", BF16),
    _case("SD 1.5, 2048 px", (256, 256), 8, 40, "cuda", BF16),
    _case("odd grid 129 x 97", (129, 97), 10, 64, "cuda", BF16),
    _case("SDXL-Turbo 1024 px, pooled level", (32, 32), 10, 64, "cuda", BF16),
    _case("SDXL 4096 px", (256, 256), 10, 64, "cuda", BF16),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Query, key and value `[B, S, H, D]`, drawn on the CPU so that every device gets the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    height, width = case.shape["grid"]
    size = (case.shape["batch"], height * width, case.shape["heads"], case.shape["head_dim"])
    return {name: torch.randn(size, generator=generator).to(device, dtype) for name in ("query", "key", "value")}


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Two matrix products per window; query, key and value read and the output written once."""
    per_token = case.shape["batch"] * case.shape["heads"] * case.shape["head_dim"]
    windows = window_tokens(case)
    tokens = sum(len(window) for window in windows)
    return Cost(
        4.0 * per_token * sum(len(window) ** 2 for window in windows), 4.0 * per_token * tokens * dtype.itemsize
    )


def window_tokens(case: Case) -> list[torch.Tensor]:
    """The tokens of each window, from the definition and not from the code under test."""
    height, width = case.shape["grid"]
    shift_y, shift_x = case.shape["shift"]
    rolled = torch.arange(height * width).view(height, width).roll((-shift_y, -shift_x), (0, 1))
    rows, columns = case.shape["windows"]
    return [part.flatten() for strip in rolled.tensor_split(rows, 0) for part in strip.tensor_split(columns, 1)]


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """First head of the first image and last head of the last, `[2, S, 1, D]`: heads do not depend on one another."""
    return torch.stack((tensor[0, :, :1], tensor[-1, :, -1:]))


def check(case: Case, inputs: Inputs) -> Check:
    """The reference in fp32 (fp64 for fp32 inputs), and SDPA window by window in the dtype of the inputs."""
    query, key, value = (sample(inputs[name]) for name in ("query", "key", "value"))
    precise = torch.float64 if query.dtype == torch.float32 else torch.float32
    with kernels.use_backend("reference"):
        exact = kernels.window_attention(query.to(precise), key.to(precise), value.to(precise), **_geometry(case))
    yardstick = torch.empty_like(query)
    for tokens in (window.to(query.device) for window in window_tokens(case)):
        part = scaled_dot_product_attention(*heads_first(query[:, tokens], key[:, tokens], value[:, tokens]))
        yardstick[:, tokens] = part.transpose(1, 2)
    return Check(exact, yardstick, sample)


def contenders(device: torch.device) -> tuple[Contender, ...]:
    backends = [backend for backend in get_op(NAME).implementations if backend != "reference"]
    ours = [Contender(f"attnswap {backend}", "ours", partial(_ours, backend)) for backend in backends]
    same = [
        Contender(f"SDPA on windows, {name}", "same", partial(_sdpa_on_windows, backend))
        for name, backend in SDPA_BACKENDS[device.type].items()
    ]
    if device.type == "cuda":
        same.append(Contender("FlexAttention, window mask", "same", _flex))
    return (*ours, *same, *dense_sdpa(device))


def _geometry(case: Case) -> dict[str, Any]:
    return {name: tuple(case.shape[name]) for name in ("grid", "windows", "shift")}


def _ours(backend: str, case: Case, inputs: Inputs) -> Prepared:
    return prepared(NAME, backend, {**inputs, **_geometry(case)})


def _sdpa_on_windows(backend: SDPBackend, case: Case, inputs: Inputs) -> Prepared:
    """SDPA on tensors that already lie window by window: windows of one size share a call."""
    batch = case.shape["batch"]
    groups: dict[int, list[torch.Tensor]] = {}
    for tokens in window_tokens(case):
        groups.setdefault(len(tokens), []).append(tokens)
    indices = [torch.stack(group).to(inputs["query"].device) for group in groups.values()]  # [windows, length]
    parts = [
        heads_first(*(inputs[name][:, index].flatten(0, 1) for name in ("query", "key", "value"))) for index in indices
    ]

    def call() -> list[torch.Tensor]:
        return [scaled_dot_product_attention(*part) for part in parts]

    def restore(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        whole = torch.empty_like(inputs["query"])
        for index, output in zip(indices, outputs, strict=True):
            whole[:, index] = output.transpose(1, 2).unflatten(0, (batch, len(index)))
        return whole

    return Prepared(call, restore, around=lambda: sdpa_kernel(backend))


def _flex(case: Case, inputs: Inputs) -> Prepared:
    windows = window_tokens(case)
    window_of = torch.empty(sum(len(window) for window in windows), dtype=torch.int32)
    for number, tokens in enumerate(windows):
        window_of[tokens] = number
    window_of = window_of.to(inputs["query"].device)
    return flex_attention(inputs, lambda batch, head, query, key: window_of[query] == window_of[key])


BENCHMARK = Benchmark(NAME, CASES, make_inputs, contenders, cost, check)
