"""One grid over two and three processes: what each gets is what one process gets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed
from attnswap import kernels
from torch import Tensor

PROCESSES = 3
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")


@dataclass(frozen=True)
class Case:
    """A grid with `rows` for each rank, and what else goes into a call. Two ranks are the second and third process."""

    rows: tuple[int, ...]
    width: int = 5
    radius: float = 3
    before: int = 0
    after: int = 0
    cell: int | None = None
    masked: bool = False

    @property
    def dense(self) -> int:
        return self.before + self.after

    def problem(self) -> dict[str, Any]:
        """The whole call, as one process makes it."""
        generator = torch.Generator().manual_seed(0)
        grid = (sum(self.rows), self.width)
        shape = (2, grid[0] * grid[1] + self.dense, 2, 8)
        query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))
        call = {"query": query, "key": key, "value": value, "grid": grid}
        call |= {"radius": self.radius, "grid_offset": self.before}
        if self.cell is not None:
            weights = torch.randn(self.cell, self.cell, generator=generator)
            for name in ("key", "value"):
                call[f"pooled_{name}"] = kernels.pool_tokens(call[name], weights, grid=grid, grid_offset=self.before)
        if self.masked:
            mask = torch.rand(shape[:2], generator=generator) > 0.4
            mask[1, : self.before + 2 * self.width] = False  # of the first rows and the text before, nothing is left
            key.masked_fill_(~mask[..., None, None], float("nan"))
            call["key_mask"] = mask
        return call

    def of_rank(self, rank: int) -> dict[str, Any]:
        """The part of the call that a rank makes."""
        call = self.problem()
        start, stop = (sum(self.rows[:n]) for n in (rank, rank + 1))
        for name in ("query", "key", "value", "key_mask"):
            if name in call:
                call[name] = self.own(call[name], start, stop)
        for name in ("pooled_key", "pooled_value"):
            if self.cell is not None:
                cells = self.width // self.cell
                call[name] = call[name][:, start // self.cell * cells : stop // self.cell * cells]
        return {**call, "grid": (stop - start, self.width)}

    def own(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Dense tokens and those of some rows."""
        grid = x[:, self.before : x.shape[1] - self.after]
        rows = grid[:, start * self.width : stop * self.width]
        return torch.cat((x[:, : self.before], rows, x[:, x.shape[1] - self.after :]), dim=1)

    def group(self) -> Any:
        return torch.distributed.group.WORLD if len(self.rows) == PROCESSES else PAIR


CASES: dict[str, Case] = {
    "two ranks": Case((3, 5)),
    "two ranks, text before": Case((5, 2), before=5),
    "two ranks, text before and after": Case((2, 4), before=2, after=3, radius=2.5),
    "two ranks, pooled": Case((2, 4), width=4, before=5, cell=2, radius=2),
    "two ranks, masked": Case((3, 5), before=3, after=2, masked=True),
    "three ranks": Case((2, 4, 3)),
    "three ranks, halo over several": Case((1, 1, 5), before=5, radius=2.5),
    "three ranks, a row of one token each": Case((1, 1, 1), width=1, after=5, radius=1),
    "three ranks, pooled and thin": Case((2, 4, 2), width=6, before=1, after=4, cell=2, radius=5),
    "three ranks, pooled and masked": Case((4, 2, 2), width=4, before=4, after=1, cell=2, masked=True, radius=4),
    "three ranks, every token sees every other": Case((3, 1, 2), before=5, radius=40),
}
PAIR: Any = None


def run_case(case: Case, rank: int) -> Tensor:
    return kernels.local_attention(**case.of_rank(rank), group=case.group())


def refusal(rank: int, change: Callable[[dict[str, Any]], Any], backend: str) -> str:
    """What a rank is told where the third is given something else."""
    call = Case((2, 2, 2), before=2).of_rank(rank)
    if rank == 2:
        change(call)
    try:
        with kernels.use_backend(backend if rank == 2 else "auto"):
            kernels.local_attention(**call, group=torch.distributed.group.WORLD)
    except ValueError as error:
        return str(error)
    return ""


# What is changed of the arguments, and the backend asked for.
REFUSALS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "radius": (lambda call: call.update(radius=0.5), "auto"),
    "width": (lambda call: call.update(grid=(1, 10)), "auto"),
    "gradient": (lambda call: call["query"].requires_grad_(), "auto"),
    "backend": (lambda call: None, "reference"),
}


def run_rank(rank: int, folder: str) -> None:
    global PAIR
    torch.distributed.init_process_group("gloo")
    PAIR = torch.distributed.new_group([1, 2])
    found: dict[str, Any] = {name: refusal(rank, *change) for name, change in REFUSALS.items()}
    for name, case in CASES.items():
        first = PROCESSES - len(case.rows)
        if rank >= first:
            found[name] = run_case(case, rank - first)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each process found, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(PROCESSES)}
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), folder],
            env={**os.environ, **meet, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        errors = [process.communicate(timeout=180)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * PROCESSES, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_with_their_own_rows_equal_one_process(ranks: Ranks, name: str) -> None:
    case = CASES[name]
    whole = kernels.local_attention(**case.problem())
    start = 0
    for found, rows in zip(ranks[PROCESSES - len(case.rows) :], case.rows, strict=True):
        torch.testing.assert_close(found[name], case.own(whole, start, start + rows), atol=5e-6, rtol=0)
        start += rows


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dense])
def test_dense_tokens_have_the_same_output_on_every_rank(ranks: Ranks, name: str) -> None:
    case = CASES[name]
    first, *others = (found[name] for found in ranks[PROCESSES - len(case.rows) :])
    for other in others:
        assert torch.equal(first[:, : case.before], other[:, : case.before])
        assert torch.equal(first[:, first.shape[1] - case.after :], other[:, other.shape[1] - case.after :])


def test_no_rank_waits_for_one_whose_arguments_are_refused(ranks: Ranks) -> None:
    elsewhere = "the arguments of rank 2 of the group were refused; its own error says why"
    assert [rank["radius"] for rank in ranks[:2]] == [elsewhere] * 2
    assert ranks[2]["radius"] == "radius must be a finite number of tokens and at least 1, got 0.5"
    assert [rank["width"] for rank in ranks] == ["grid width is 5 on rank 0 of the group but 10 on rank 2"] * 3


def test_a_wanted_gradient_is_refused(ranks: Ranks) -> None:
    assert "has no gradient" in ranks[2]["gradient"]
    assert "rank 2" in ranks[0]["gradient"]


def test_the_reference_is_of_one_process(ranks: Ranks) -> None:
    told = "local_attention over a process group cannot run on reference: eager and triton can"
    assert ranks[2]["backend"] == told
    assert "rank 2" in ranks[0]["backend"]


def test_a_group_must_be_one() -> None:
    x = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match=r"group must be a .* process group of this rank, got 2"):
        kernels.local_attention(x, x, x, grid=(2, 2), radius=1, group=2)  # type: ignore[arg-type]


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
