"""Diffusers' context parallelism: two processes that share the tokens of a model give what one process gives.

C9 of what goes wrong with the published code of CLEAR (methods/test_clear_rows.py): its processors see a share only.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import attnswap
import pytest
import torch
import torch.distributed
from diffusers import ContextParallelConfig

RANKS = 2
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")


def tiny(family: str, text: int = 6, reference: tuple[int, int] | None = None, **changes: Any) -> Any:
    """A model of a family, and the arguments of a call."""
    from families.image_models import CASES as FAMILIES  # this runs as a script, which its own folder is the path of

    case = FAMILIES[family]
    more = {} if reference is None else {"reference": reference}
    return case.make(**changes), case.inputs((6, 4), text, 2, **more)


def run(model: Any, arguments: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(**arguments, return_dict=False)[0]
    return out


def split(model: Any, **degrees: Any) -> None:
    model.enable_parallelism(config=ContextParallelConfig(**degrees))


def enabled_before(model: Any, arguments: dict[str, Any], **degrees: Any) -> dict[str, Any]:
    handle = attnswap.enable(model, attnswap.Clear(radius=2))
    alone = run(model, arguments)
    split(model, **degrees)
    return {"alone": alone, "together": run(model, arguments), "report": str(handle.report())}


def enabled_after(model: Any, arguments: dict[str, Any], **degrees: Any) -> dict[str, Any]:
    with attnswap.enabled(model, attnswap.Clear(radius=2)):
        alone = run(model, arguments)
    split(model, **degrees)
    handle = attnswap.enable(model, attnswap.Clear(radius=2))
    return {"alone": alone, "together": run(model, arguments), "report": str(handle.report())}


def masked_and_uneven() -> dict[str, Any]:
    """Of 3 heads and 5 text tokens, the last of which the second picture does not have, one rank holds more."""
    model, arguments = tiny("qwen_image", text=5)
    arguments["encoder_hidden_states_mask"] = torch.tensor([[True] * 5, [True] * 4 + [False]])
    return enabled_before(model, arguments, ulysses_degree=RANKS, ulysses_anything=True)


def video() -> dict[str, Any]:
    """Of the 3 heads of Wan one rank holds more; by the road that methods for video take."""
    from families.dense_strategy import dense, seen
    from video_models import WAN

    case = WAN[0]
    model, arguments = case.make(num_attention_heads=3), case.inputs((2, 5, 7), 6, 2)
    alone = run(model, arguments)
    split(model, ulysses_degree=RANKS)
    with dense(model) as handle:
        together = run(model, arguments)
        shapes = [list(call.shape) for call in seen(handle).values()]
        return {"alone": alone, "together": together, "report": str(handle.report()), "shapes": shapes}


def disabled() -> dict[str, Any]:
    model, arguments = tiny("flux")
    alone = run(model, arguments)
    handle = attnswap.enable(model, attnswap.Clear(radius=2))
    split(model, ulysses_degree=RANKS)
    local = run(model, arguments)
    handle.disable()
    return {"alone": alone, "together": run(model, arguments), "local": local}


def refused(family: str, cp_plan: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    model, arguments = tiny(family, **changes)
    attnswap.enable(model, attnswap.Clear(radius=2))
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=RANKS), cp_plan=cp_plan)
    try:
        run(model, arguments)
    except ValueError as error:
        return {"error": str(error)}
    return {}


RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    "enabled before": lambda: enabled_before(*tiny("flux"), ulysses_degree=RANKS),
    "enabled after": lambda: enabled_after(*tiny("flux"), ulysses_degree=RANKS),
    "ring": lambda: enabled_after(*tiny("flux"), ring_degree=RANKS),
    "reference image": lambda: enabled_before(*tiny("flux2", reference=(2, 3)), ulysses_degree=RANKS),
    "mask, uneven shares": masked_and_uneven,
    "video": video,
    "disabled": disabled,
}
REFUSALS: dict[str, Callable[[], dict[str, Any]]] = {
    "heads": lambda: refused("flux", num_attention_heads=1),
    "no plan": lambda: refused("sd3", cp_plan={}),
}


def run_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=RANKS)
    # Diffusers asks which accelerator there is, and divides by how many.
    torch.accelerator.device_count = lambda: 1
    torch._C._get_accelerator = lambda *unused: torch.device("cpu")  # type: ignore[assignment]
    torch.save({name: case() for name, case in (RUNS | REFUSALS).items()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


Ranks = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """What each rank found, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    running = [
        subprocess.Popen([sys.executable, __file__, str(rank), folder], stderr=subprocess.PIPE, text=True)
        for rank in range(RANKS)
    ]
    try:
        errors = [process.communicate(timeout=180)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * RANKS, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("name", RUNS)
def test_ranks_together_give_what_one_process_gives(ranks: Ranks, name: str) -> None:
    for found in (rank[name] for rank in ranks):
        torch.testing.assert_close(found["together"], found["alone"], atol=1e-5, rtol=0)


def test_stock_and_local_attention_are_told_apart_here(ranks: Ranks) -> None:
    found = ranks[0]["disabled"]
    assert (found["local"] - found["alone"]).abs().max() > 1e-2


@pytest.mark.parametrize("name", [name for name in RUNS if name != "disabled"])
def test_the_report_says_that_heads_were_exchanged_and_nothing_ran_dense(ranks: Ranks, name: str) -> None:
    report = ranks[0][name]["report"]
    assert "exchange heads for tokens over 2 ranks" in report
    assert " 0 dense" in report


def test_a_method_for_video_sees_all_tokens_and_a_share_of_the_heads(ranks: Ranks) -> None:
    shapes = [rank["video"]["shapes"] for rank in ranks]
    assert shapes == [[[2, 70, 2, 12]] * 2, [[2, 70, 1, 12]] * 2]


def test_fewer_heads_than_ranks_are_refused_on_every_rank(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["heads"]["error"] == "1 attention heads cannot be shared out over 2 context parallel ranks"


def test_a_model_that_diffusers_has_no_plan_for_is_refused(ranks: Ranks) -> None:
    for rank in ranks:
        assert "no plan for context parallelism of SD3Transformer2DModel" in rank["no plan"]["error"]


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
