"""The clock by itself: where a timestep stands in its run, however it is handed over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from attnswap.accel.context import Clock, Schedule, schedule_behind

Hand = Callable[[torch.Tensor], Any]

#: The ways in which sampling loops hand a timestep to the denoiser.
HANDS: dict[str, Hand] = {
    "view": lambda t: t,
    "expanded": lambda t: t.expand(3),
    "one element": lambda t: t[None],
    "expanded twice": lambda t: t.expand(2)[None].expand(3, 2),
    "copy": lambda t: t.clone(),
    "repeated copy": lambda t: t.repeat(3),
    "another precision": lambda t: t.to(torch.float64),
    "float": float,
    "numpy": lambda t: t.numpy()[()],
}


def timesteps_of(scheduler: str, steps: int = 4) -> torch.Tensor:
    made = getattr(diffusers, scheduler)()
    made.set_timesteps(steps)
    return made.timesteps


def walk(clock: Clock, timesteps: Any, hand: Hand = HANDS["view"], **more: Any) -> list[tuple[Any, ...]]:
    """Step, number of steps and run at each call of a loop with two guidance branches."""
    seen = []
    for t in timesteps:
        for branch in ("cond", "uncond"):
            clock.tick(hand(t), branch, **more)
            seen.append((clock.step, clock.steps, clock.branch, clock.run))
    return seen


def wanted(steps: int, run: int, total: int | None = -1) -> list[tuple[Any, ...]]:
    total = steps if total == -1 else total
    return [(step, total, branch, run) for step in range(steps) for branch in (0, 1)]


SCHEDULERS = ["DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "HeunDiscreteScheduler"]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("hand", HANDS)
def test_a_told_list_is_enough_however_its_timesteps_are_handed_over(scheduler: str, hand: str) -> None:
    clock, timesteps = Clock(), timesteps_of(scheduler)
    clock.set_timesteps(timesteps)
    first = walk(clock, timesteps, HANDS[hand])
    assert first == wanted(len(timesteps), run=first[0][-1])
    again = walk(clock, timesteps, HANDS[hand])
    assert again == wanted(len(timesteps), run=again[0][-1])
    assert again[0][-1] != first[0][-1]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("hand", ["view", "expanded", "one element", "expanded twice"])
def test_a_view_shows_the_list_it_is_from_though_nobody_told(scheduler: str, hand: str) -> None:
    clock, timesteps = Clock(), timesteps_of(scheduler)
    seen = walk(clock, timesteps, HANDS[hand])
    assert seen == wanted(len(timesteps), run=seen[0][-1])


@pytest.mark.parametrize("hand", ["copy", "repeated copy", "float", "numpy"])
def test_copies_nobody_told_about_are_counted_by_change(hand: str) -> None:
    clock = Clock()
    for steps in (4, 4, 1, 3):
        seen = walk(clock, timesteps_of("DDIMScheduler", steps), HANDS[hand])
        if steps == 1:  # one copy says neither which way a run goes nor that it is a new one
            continue
        assert seen == wanted(steps, run=seen[0][-1], total=None)


def test_a_repeated_timestep_in_copies_is_a_step_and_another_branch_is_not() -> None:
    for timesteps in (timesteps_of("HeunDiscreteScheduler"), timesteps_of("PNDMScheduler")):
        clock = Clock()
        assert len(set(timesteps.tolist())) < len(timesteps)
        assert walk(clock, timesteps, HANDS["copy"]) == wanted(len(timesteps), run=0, total=None)


def test_a_run_aborted_in_its_first_step_does_not_count() -> None:
    clock, timesteps = Clock(), timesteps_of("DDIMScheduler")
    clock.tick(timesteps[0].clone(), "cond")
    seen = walk(clock, timesteps, HANDS["copy"])
    assert seen == wanted(4, run=seen[0][-1], total=None)
    assert seen[0][-1] != 0


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("hand", HANDS)
def test_nor_does_one_over_the_very_list_that_is_then_run(hand: str, start: int) -> None:
    clock, timesteps = Clock(), timesteps_of("DDIMScheduler")
    schedule = Schedule(timesteps)
    clock.tick(HANDS[hand](timesteps[start]), "cond", schedule=schedule)
    aborted = clock.run
    seen = walk(clock, timesteps[start:], HANDS[hand], schedule=schedule)
    assert seen == wanted(4 - start, run=aborted + 1)


def test_an_official_step_counts_above_all_and_a_smaller_one_begins_a_run() -> None:
    clock = Clock()

    def step(index: int, branch: str) -> tuple[Any, ...]:
        clock.tick(torch.tensor(7.0), branch, step_index=index, steps=3)
        return clock.step, clock.steps, clock.branch, clock.run

    assert [step(i, b) for i in range(3) for b in ("cond", "uncond")] == wanted(3, run=0)
    assert [step(i, b) for i in range(3) for b in ("cond", "uncond")] == wanted(3, run=1)
    assert step(0, "cond") == (0, 3, 0, 2)
    # Out of memory in the very first call, and begun again.
    assert step(0, "cond") == (0, 3, 0, 3)
    assert step(0, "uncond") == (0, 3, 1, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_timesteps_rounded_to_the_models_precision_keep_their_places(dtype: torch.dtype) -> None:
    """In bfloat16 999 becomes 1000: it must not be taken for the first of the list."""
    timesteps = torch.tensor([1000.0, 999.0, 998.0, 997.0, 991.0, 970.0, 900.0, 500.0, 1.0])
    clock = Clock()
    seen = walk(clock, timesteps, lambda t: t.expand(2).to(dtype), schedule=Schedule(timesteps), steps=9)
    assert seen == wanted(9, run=seen[0][-1])


def test_timesteps_scaled_by_the_pipeline_are_counted_in_its_list() -> None:
    timesteps = timesteps_of("FlowMatchEulerDiscreteScheduler")
    for scale in (lambda t: t / 1000, lambda t: (1000 - t) / 1000):
        clock = Clock()
        for run in (1, 2):
            own = timesteps.clone()  # set_timesteps makes a new list for each run
            assert walk(clock, own, scale, schedule=Schedule(own), steps=4) == wanted(4, run=run)


@pytest.mark.parametrize("hand", HANDS)
def test_a_truncated_run_counts_from_where_it_starts(hand: str) -> None:
    clock, timesteps = Clock(), timesteps_of("DDIMScheduler", 10)
    places = []
    for t in timesteps[6:]:
        clock.tick(HANDS[hand](t), "cond", schedule=Schedule(timesteps), steps=4)
        places.append((clock.step, clock.steps, clock.position, clock.total))
    assert places == [(0, 4, 6, 10), (1, 4, 7, 10), (2, 4, 8, 10), (3, 4, 9, 10)]


def test_two_loops_over_lists_of_their_own_do_not_mix() -> None:
    clock = Clock()
    long, short = timesteps_of("DDIMScheduler", 8), timesteps_of("EulerDiscreteScheduler", 3)
    for timesteps in (long, short, long[:4], short, long):
        begun = clock.run
        seen = walk(clock, timesteps)
        assert [entry[0] for entry in seen[::2]] == list(range(len(timesteps)))
        assert {entry[-1] for entry in seen} == {begun + 1}


@pytest.mark.parametrize("kind", [list, tuple, np.float32, np.float64])
def test_a_told_list_may_be_numbers(kind: Any) -> None:
    clock, numbers = Clock(), [0.9, 0.6, 0.3]
    told: Any = kind(numbers) if kind in (list, tuple) else np.asarray(numbers, dtype=kind)
    clock.set_timesteps(told)
    for handed in (told, [torch.tensor(t) for t in told]):
        seen = walk(clock, handed, hand=lambda t: t)
        assert [entry[:2] for entry in seen[::2]] == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize("timesteps", [[], torch.tensor([]), torch.tensor(3.0), torch.ones(2, 2)])
def test_what_is_no_list_of_timesteps_is_refused(timesteps: Any) -> None:
    with pytest.raises(ValueError, match="non-empty list"):
        Clock().set_timesteps(timesteps)


def test_one_timestep_per_token_counts_as_its_largest() -> None:
    clock, timesteps = Clock(), timesteps_of("FlowMatchEulerDiscreteScheduler")

    def per_token(t: torch.Tensor) -> torch.Tensor:
        tokens = t.repeat(2, 6)
        tokens[:, :2] = 0  # the first frame is given
        return tokens

    assert walk(clock, timesteps, per_token, schedule=Schedule(timesteps), steps=4) == wanted(4, run=1)


def test_a_companion_reads_the_step_without_being_a_branch() -> None:
    """A ControlNet is called before the denoiser, in the same step, and may be left out of some."""
    clock, timesteps = Clock(), timesteps_of("DDIMScheduler")
    for k, t in enumerate(timesteps):
        if k != 2:
            clock.tick(t)
        clock.tick(t, "cond")
        assert (clock.step, clock.branch) == (k, 0)


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor(500.0), torch.rand(64) * 100 - 50, torch.full((4,), 7.0), torch.tensor([3, 1, 2])],
    ids=["alone", "noise", "constant", "unordered"],
)
def test_a_tensor_that_runs_no_one_way_is_no_list_of_timesteps(tensor: torch.Tensor) -> None:
    timestep = tensor.flatten()[0]
    assert schedule_behind(timestep) is None
    clock = Clock()
    clock.tick(timestep, "cond")
    assert (clock.step, clock.steps) == (0, None)


def test_reset_begins_a_run() -> None:
    clock, timesteps = Clock(), timesteps_of("DDIMScheduler")
    for t in timesteps[:2]:
        clock.tick(t, "cond")
    before = clock.run
    clock.reset()
    assert (clock.step, clock.steps) == (None, None)
    clock.tick(timesteps[0], "cond")
    assert clock.step == 0
    assert clock.run != before


@torch.inference_mode()
def test_inference_mode_changes_nothing() -> None:
    test_a_view_shows_the_list_it_is_from_though_nobody_told("DDIMScheduler", "expanded")
    timesteps = timesteps_of("DDIMScheduler")
    with torch.inference_mode(False):
        outside = timesteps_of("DDIMScheduler")
        clock = Clock()
        walk(clock, outside)
    assert walk(clock, timesteps) == wanted(4, run=clock.run)
    assert walk(clock, outside) == wanted(4, run=clock.run)
