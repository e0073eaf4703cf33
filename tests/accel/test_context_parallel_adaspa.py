"""AdaSpa on two processes that share the tokens of a model: each searches and attends with its share of the heads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import attnswap
import pytest
import torch
import torch.distributed
from attnswap.accel.families.base import Place
from diffusers import ContextParallelConfig

from . import video_models
from .methods import adaspa_cases as cases
from .methods.adaspa_cases import SMALL

RANKS = 2
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")


def split(model: Any) -> None:
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=RANKS, ulysses_anything=True))


def found(handle: attnswap.Handle) -> dict[str, Any]:
    layers = cases.layers_of(handle)
    return {
        "counts": [[x["dense_calls"], x["searches"], x["accelerated_calls"]] for x in layers],
        "levels": [x["branches"][0]["level"] for x in layers],
        "fell_back": [x["branches"][0]["fell_back"] for x in layers],
        "report": str(handle.report()),
    }


GRID, TEXT = (7, 8), 10


def small_flux() -> tuple[Any, cases.Steps]:
    """66 tokens, in five blocks of which the last has two."""
    return cases.flux(num_layers=1, num_single_layers=1), cases.steps(grid=GRID, text=TEXT)


def heads_alike() -> dict[str, Any]:
    config, (model, run) = replace(SMALL, head_adaptive=False), small_flux()
    with attnswap.enabled(model, config) as handle:
        alone = run.of(model, handle)
    handle = attnswap.enable(model, config)
    split(model)
    return {"alone": alone, "together": run.of(model, handle), **found(handle)}


def heads_ranked() -> dict[str, Any]:
    model, run = small_flux()
    place = Place(GRID, start=TEXT, around=TEXT)
    alone, _ = cases.by_definition(model, run, SMALL, place, layers=2)
    ranked, _ = cases.by_definition(model, run, SMALL, place, layers=2, ranks=RANKS)
    handle = attnswap.enable(model, SMALL)
    split(model)
    return {"alone": alone, "ranked": ranked, "together": run.of(model, handle), **found(handle)}


def wan_in_tiles() -> dict[str, Any]:
    """Video alone."""
    case, config = video_models.CASES["wan"], replace(SMALL, head_adaptive=False, reorder="tile")
    model = cases.sharpen(case.make().double(), 2.0)
    run = cases.Steps(cases.in_dtype(case.inputs((3, 5, 6), 6, 1), torch.float64))
    with attnswap.enabled(model, config) as handle:
        alone = run.of(model, handle)
    split(model)
    handle = attnswap.enable(model, config)
    return {"alone": alone, "together": run.of(model, handle), **found(handle)}


def no_numbers_on_one_rank() -> dict[str, Any]:
    """In a query of the last head, which only the second rank has."""
    (model, run), now = small_flux(), [0]
    attention = model.transformer_blocks[0].attn

    def told(step: int, branch: int) -> None:
        now[0] = step

    def spoil(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        if now[0] == 2:
            out = out.clone()
            out[:, 0, -1] = float("inf")
        return out

    run.told = told
    attention.norm_q.register_forward_hook(spoil)
    attention.register_forward_hook(lambda module, args, out: tuple(x.nan_to_num(0, 0, 0) for x in out))
    handle = attnswap.enable(model, SMALL)
    split(model)
    run.of(model, handle)
    return found(handle)


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "heads alike": heads_alike,
    "heads ranked": heads_ranked,
    "tiles": wan_in_tiles,
    "no numbers": no_numbers_on_one_rank,
}


def run_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=RANKS)
    # Diffusers asks which accelerator there is, and divides by how many.
    torch.accelerator.device_count = lambda: 1
    torch._C._get_accelerator = lambda *unused: torch.device("cpu")  # type: ignore[assignment]
    torch.save({name: case() for name, case in CASES.items()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


Ranks = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each rank found, by case."""
    folder, root = tmp_path_factory.mktemp("ranks"), Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.accel.test_context_parallel_adaspa"]
    running = [
        subprocess.Popen([*command, str(rank), folder], cwd=root, stderr=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    try:
        errors = [process.communicate(timeout=180)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * RANKS, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("name", ["heads alike", "tiles"])
def test_ranks_together_give_what_one_process_gives(ranks: Ranks, name: str) -> None:
    for rank in ranks:
        assert cases.largest_difference(rank[name]["together"], rank[name]["alone"]) <= cases.CLOSE
        assert rank[name]["counts"] == [[2, 2, 3]] * len(rank[name]["counts"])


def test_heads_are_ranked_among_those_of_a_rank_and_the_report_says_so(ranks: Ranks) -> None:
    for rank in (rank["heads ranked"] for rank in ranks):
        assert cases.largest_difference(rank["together"], rank["ranked"]) <= cases.CLOSE
        assert cases.largest_difference(rank["together"], rank["alone"]) > 1e3 * cases.CLOSE
        assert [[sorted(level) for level in levels] for levels in rank["levels"]] == [[[-1, 1]]] * 2
        assert "heads are ranked among those of a rank" in rank["report"]
    assert "are ranked" not in ranks[0]["heads alike"]["report"]


def test_a_layer_without_numbers_on_one_rank_is_dense_on_all(ranks: Ranks) -> None:
    """Else they would wait for one another: stock attention exchanges other tensors than ours."""
    for rank in (rank["no numbers"] for rank in ranks):
        assert rank["counts"] == [[5, 1, 0], [2, 2, 3]]
        assert rank["fell_back"] == [True, False]


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
