"""A benchmark small enough to run in every test: doubling a vector."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attnswap.benchmarks.registry import Benchmark, Case, Check, Contender, Cost, Prepared


def _contender(name: str, role: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Contender:
    return Contender(name, role, lambda case, inputs: Prepared(lambda: function(inputs["x"])))


def _check(case: Case, inputs: dict[str, torch.Tensor]) -> Check:
    exact = inputs["x"].double() * 2
    return Check(exact, yardstick=inputs["x"] * 2, sample=lambda output: output)


@pytest.fixture
def doubling() -> Callable[..., Benchmark]:
    """`doubling(ours=f, same=g, …)` builds a benchmark of these functions; each is its own contender and role."""

    def build(name: str = "doubling", cases: int = 1, **functions: Callable[[torch.Tensor], torch.Tensor]) -> Benchmark:
        roles = {"ours", "same", "dense"}
        return Benchmark(
            name=name,
            cases=tuple(Case(f"size {i}", {"length": 64 + i}, "cpu", (torch.float32,), True) for i in range(cases)),
            make_inputs=lambda case, dtype, device, seed: {
                "x": torch.randn(
                    case.shape["length"], dtype=dtype, device=device, generator=torch.Generator().manual_seed(seed)
                )
            },
            contenders=lambda device: tuple(
                _contender(key, key if key in roles else "ours", function) for key, function in functions.items()
            ),
            cost=lambda case, dtype: Cost(case.shape["length"], 8.0 * case.shape["length"]),
            check=_check,
        )

    return build


@pytest.fixture(autouse=True)
def _no_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ceiling takes a second to measure; no test here is about its value."""
    from attnswap.benchmarks import machine, runner

    monkeypatch.setattr(machine, "measure_ceiling", lambda device, dtype: machine.Ceiling(1e11, 1e10))
    monkeypatch.setattr(runner, "QUICK_SECONDS_PER_CASE", 0.001)
