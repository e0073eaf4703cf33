"""Cases, inputs and contenders of `kernels.linear_attention`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch.nn.functional import elu

from .. import kernels
from ..kernels.dispatch import get_op
from .baselines import dense_sdpa
from .ours import prepared
from .registry import Benchmark, Case, Check, Contender, Cost, Inputs, Prepared, Scale

NAME = "linear_attention"
EPS = 1e-4
FP32, FP16, BF16 = (torch.float32,), (torch.float16,), (torch.bfloat16,)


def _case(
    label: str,
    tokens: int,
    heads: int,
    head_dim: int,
    device: str,
    dtypes: tuple[torch.dtype, ...],
    *,
    batch: int,
    series: str,
) -> Case:
    shape = {"batch": batch, "tokens": tokens, "heads": heads, "head_dim": head_dim}
    where = "cuda" if device == "cuda" else "cpu"
    return Case(label, shape, where, dtypes, quick=label in QUICK, scale=Scale(series, tokens))


def _sd15(label: str, tokens: int, device: str, dtypes: tuple[torch.dtype, ...], batch: int) -> Case:
    return _case(label, tokens, 8, 40, device, dtypes, batch=batch, series="SD 1.5, first level")


def _sdxl(label: str, tokens: int, dtypes: tuple[torch.dtype, ...]) -> Case:
    return _case(label, tokens, 10, 64, "cuda", dtypes, batch=2, series="SDXL, first attention")


QUICK = ("1K tokens", "4K tokens", "SD 1.5, 1024 px", "SDXL, 1024 px")
# On a CPU one head count and dimension all along; on a GPU the layers of SD 1.5 and SDXL, with a guidance batch of 2,
# in the order of their worth: a time budget cuts from the end.
CASES = (
    _sd15("1K tokens", 2**10, "cpu", FP32, 1),
    _sd15("4K tokens", 2**12, "cpu", FP32 + BF16, 1),
    _sd15("16K tokens", 2**14, "cpu", FP32, 1),
    _sd15("64K tokens", 2**16, "cpu", FP32 + BF16, 1),
    _sd15("256K tokens", 2**18, "cpu", FP32, 1),
    _sd15("1M tokens", 2**20, "cpu", FP32, 1),
    _sd15("SD 1.5, 1024 px", 2**14, "cuda", BF16 + FP16, 2),
    _sdxl("SDXL, 1024 px", 2**12, BF16 + FP16),
    _sd15("SD 1.5, 2048 px", 2**16, "cuda", BF16 + FP16, 2),
    _sdxl("SDXL, 2048 px", 2**14, BF16),
    _sd15("SD 1.5, 4096 px", 2**18, "cuda", BF16, 2),
    _sdxl("SDXL, 4096 px", 2**16, BF16),
    _case("SDXL, 2048 px, second level", 2**12, 20, 64, "cuda", BF16, batch=2, series="SDXL, second attention"),
    _case("SD 1.5, 2048 px, second level", 2**14, 8, 80, "cuda", BF16, batch=2, series="SD 1.5, second level"),
    _case("SD 1.5, 2048 px, third level", 2**12, 8, 160, "cuda", BF16, batch=2, series="SD 1.5, third level"),
    _sdxl("SDXL, 8192 px", 2**18, BF16),
    _sd15("SD 1.5, 8192 px", 2**20, "cuda", BF16, 2),
)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Query, key and value `[B, S, H, D]`, drawn on the CPU so that every device gets the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    size = tuple(case.shape[name] for name in ("batch", "tokens", "heads", "head_dim"))
    return {name: torch.randn(size, generator=generator).to(device, dtype) for name in ("query", "key", "value")}


def cost(case: Case, dtype: torch.dtype) -> Cost:
    """Two products with a D x D matrix for each token; query, key and value read and the output written once."""
    elements = case.shape["batch"] * case.shape["tokens"] * case.shape["heads"] * case.shape["head_dim"]
    return Cost(4.0 * elements * case.shape["head_dim"], 4.0 * elements * dtype.itemsize)


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """First head of the first image and last head of the last, `[2, S, 1, D]`: heads do not depend on one another."""
    return torch.stack((tensor[0, :, :1], tensor[-1, :, -1:]))


def check(case: Case, inputs: Inputs) -> Check:
    """The reference in fp64, and the published form in the dtype of the inputs."""
    tensors = [sample(inputs[name]) for name in ("query", "key", "value")]
    with kernels.use_backend("reference"):
        exact = kernels.linear_attention(*(x.double() for x in tensors), eps=EPS)
    return Check(exact, published_form(*tensors), sample)


def published_form(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Linear attention as LinFusion's published code computes it, `[B, S, H, D]`: whole tensors, in their dtype."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    query, key = elu(query) + 1.0, elu(key) + 1.0
    scale = key.shape[-2] ** -0.5
    denominator = query @ key.mean(dim=-2, keepdim=True).transpose(-2, -1) + EPS
    state = (key.transpose(-2, -1) * scale) @ (value * scale)
    return ((query @ state) / denominator).transpose(1, 2)


def contenders(device: torch.device) -> tuple[Contender, ...]:
    backends = [backend for backend in get_op(NAME).implementations if backend != "reference"]
    ours = [Contender(f"attnswap {backend}", "ours", partial(_ours, backend)) for backend in backends]
    same = Contender("published form in PyTorch", "same", _published)
    # The math backend keeps a matrix of tokens x tokens: no alternative at these sizes.
    dense = [replace(contender, order=2) for contender in dense_sdpa(device) if not contender.name.endswith("math")]
    return (*ours, same, *dense)


def _published(case: Case, inputs: Inputs) -> Prepared:
    return Prepared(lambda: published_form(**inputs))


def _ours(backend: str, case: Case, inputs: Inputs) -> Prepared:
    return prepared(NAME, backend, {**inputs, "eps": EPS})


BENCHMARK = Benchmark(NAME, CASES, make_inputs, contenders, cost, check, memory=True)
