"""What a processor cannot see by itself: which denoising step this is, of how many, and which guidance branch.

Calls are never counted. A step is the position of the timestep in the run's list of timesteps; only where no list can
be found does the clock fall back to noticing that the timestep has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch

from .report import Recorder


@dataclass(frozen=True)
class Schedule:
    """A list of timesteps, in the order in which they are run.

    `truncated` says that the list is exactly what will be run. Otherwise a run may start inside it, as
    image-to-image does, and its first call tells where. `at_most` steps are run, where a run stops before the end.
    """

    timesteps: torch.Tensor
    truncated: bool = False
    at_most: int | None = None

    def __len__(self) -> int:
        return self.timesteps.numel()

    def is_same(self, other: Schedule | None) -> bool:
        return other is not None and self.timesteps.data_ptr() == other.timesteps.data_ptr() and len(self) == len(other)

    def position_of_view(self, timestep: torch.Tensor) -> int | None:
        """The position of an element that is a view into this list, without reading it from the device."""
        if timestep.untyped_storage().data_ptr() != self.timesteps.untyped_storage().data_ptr():
            return None
        position = (timestep.storage_offset() - self.timesteps.storage_offset()) // max(1, self.timesteps.stride(0))
        return position if 0 <= position < len(self) else None

    def positions_of(self, timestep: torch.Tensor | float) -> list[int]:
        """The positions of elements equal to a timestep, in the precision the timestep has been cast to."""
        timesteps = self.timesteps.to(timestep.dtype) if isinstance(timestep, torch.Tensor) else self.timesteps
        value = _value(timestep)
        return [i for i, t in enumerate(timesteps.tolist()) if t == value]


def schedule_behind(timestep: torch.Tensor | float) -> Schedule | None:
    """The list that a timestep was taken from, where a sampling loop iterates over a tensor.

    `for t in scheduler.timesteps` yields 0-d views whose storage is the whole list, whoever runs the loop.
    """
    if not _one_element(timestep):
        return None
    storage = timestep.untyped_storage()
    length = storage.nbytes() // timestep.element_size()
    if length < 2:
        return None
    whole = torch.empty(0, dtype=timestep.dtype, device=timestep.device).set_(storage, 0, (length,), (1,))
    steps = whole.diff()
    # A list of timesteps runs one way; anything else is some other tensor that the timestep happens to live in.
    if not (bool((steps <= 0).all()) or bool((steps >= 0).all())) or bool((steps == 0).all()):
        return None
    return Schedule(whole)


class Clock:
    """Tells the step, the number of steps and the guidance branch of each denoiser call.

    Attributes:
        step: 0-based position in the run, None before the first call.
        steps: how many steps the run has, None where nothing tells.
        position, total: the same in the list before image-to-image truncation.
        branch: order of appearance of this call's guidance branch within the run.
        named: the branch has a name, and is not only told by where its text lies.
        run: changes whenever a new run begins; state of an earlier run is stale.
    """

    def __init__(self) -> None:
        self.run = 0
        self._told: Schedule | None = None
        self._last: torch.Tensor | float | None = None
        self._begin_run(None)

    def reset(self) -> None:
        """Forget the run: the next call begins a new one."""
        self.run += 1
        self._told = None
        self._begin_run(None)

    def set_timesteps(self, timesteps: torch.Tensor | Sequence[float]) -> None:
        """Begin a run over exactly these timesteps (own sampling loops; pipelines are understood without it)."""
        # Python's floats keep their precision, or a loop over them would not find itself in the list.
        as_tensor = (
            timesteps if isinstance(timesteps, torch.Tensor) else torch.as_tensor(timesteps, dtype=torch.float64)
        )
        if as_tensor.ndim != 1 or as_tensor.numel() == 0:
            raise ValueError(f"timesteps must be a non-empty list, got shape {tuple(as_tensor.shape)}")
        self.run += 1
        self._begin_run(None)
        self._told = Schedule(as_tensor, truncated=True)

    def tick(
        self,
        timestep: torch.Tensor | float,
        branch: object = None,
        *,
        schedule: Schedule | None = None,
        steps: int | None = None,
        step_index: int | None = None,
    ) -> None:
        """Take note of a call.

        Args:
            timestep: as the denoiser gets it, in the scheduler's units.
            branch: what tells guidance branches apart (a cache-context name or the text tensor's address);
                None for a companion such as a ControlNet, which only asks where the run stands.
            schedule: the pipeline's own list, where a pipeline is known.
            steps: number of steps the pipeline says it runs, used where the timestep is in no list.
            step_index: the official step, where Diffusers gives one.
        """
        if step_index is not None:
            self._tick_official(step_index, branch, steps)
        else:
            located = self._locate(timestep, branch, schedule)
            if located is None:
                self._tick_by_change(timestep, branch, schedule, steps)
            else:
                known, position, is_view = located
                # A view is certain; of an equal value the pipeline's own number knows better how many follow.
                self._tick_listed(known, position, branch, steps if known.is_same(schedule) and not is_view else None)
        if branch is not None:
            self._seen.add(branch)
            self.branch = self._branches.setdefault(branch, len(self._branches))
            self.named = isinstance(branch, str)
        self._last = timestep

    def _begin_run(self, schedule: Schedule | None) -> None:
        self.step: int | None = None
        self.steps: int | None = None
        self.position: int | None = None
        self.total: int | None = None
        self.branch = 0
        self.named = False
        self._schedule = schedule
        self._start = 0
        self._direction = 0
        self._last = None
        self._seen: set[object] = set()
        self._branches: dict[object, int] = {}

    def _locate(
        self, timestep: torch.Tensor | float, branch: object, pipeline: Schedule | None
    ) -> tuple[Schedule, int, bool] | None:
        """Which list the timestep belongs to, where in it, and whether it is a view of it, not only an equal value."""
        if _one_element(timestep):
            for known in (self._told, pipeline, self._schedule):
                if known is not None and (position := known.position_of_view(timestep)) is not None:
                    return known, position, True
            # Last, because it reads the list from the device.
            if (behind := schedule_behind(timestep)) and (position := behind.position_of_view(timestep)) is not None:
                return behind, position, True
        for known in (self._told, pipeline, self._schedule):
            if known is not None and (position := self._position_of_value(known, timestep, branch)) is not None:
                return known, position, False
        return None

    def _position_of_value(self, schedule: Schedule, timestep: torch.Tensor | float, branch: object) -> int | None:
        found = schedule.positions_of(timestep)
        if not found or self.position is None or not self._continues(schedule):
            return found[0] if found else None
        # Second-order schedulers list a timestep twice: the same branch seen again means the next one of the two.
        repeated = branch is not None and branch in self._seen and _value(self._last) == _value(timestep)
        later = [i for i in found if (i > self.position if repeated else i >= self.position)]
        return later[0] if later else found[-1] if repeated else found[0]

    def _continues(self, schedule: Schedule) -> bool:
        return self._schedule is not None and schedule.is_same(self._schedule)

    def _tick_listed(self, schedule: Schedule, position: int, branch: object, steps: int | None) -> None:
        aborted_at_once = position == self.position == self._start and branch in self._seen
        earlier = self.position is not None and position < self.position
        if not self._continues(schedule) or earlier or aborted_at_once:
            self.run += 1
            self._begin_run(schedule)
        if self.position is None:
            self._start = 0 if schedule.truncated else position
        elif position != self.position:
            self._seen = set()
        self.position, self.total = position, len(schedule)
        self.step = position - self._start
        self.steps = len(schedule) - self._start if steps is None else steps
        if schedule.at_most is not None:
            self.steps = min(self.steps, schedule.at_most)

    def _tick_official(self, step_index: int, branch: object, steps: int | None) -> None:
        aborted_at_once = step_index == 0 and branch in self._seen
        if self.step is not None and (step_index < self.step or aborted_at_once):
            self.run += 1
            self._begin_run(None)
        elif step_index != self.step:
            self._seen = set()
        self.step = self.position = step_index
        self.steps = self.total = steps

    def _tick_by_change(
        self, timestep: torch.Tensor | float, branch: object, pipeline: Schedule | None, steps: int | None
    ) -> None:
        if pipeline is not None and not self._continues(pipeline):
            self.run += 1
            self._begin_run(pipeline)
        value = _value(timestep)
        if self.step is None or self._last is None:
            self.step = 0
        elif value == (last := _value(self._last)) and branch not in self._seen:
            pass  # another guidance branch of the same step
        else:
            direction = (value > last) - (value < last)
            # Schedulers that repeat a timestep do not repeat the first: it comes again where a run was aborted at once.
            aborted_at_once = not direction and self.step == 0
            if aborted_at_once or (self._direction and direction and direction != self._direction):
                self.run += 1
                self._begin_run(self._schedule)
                self.step = 0
            else:
                self.step += 1
                self._direction = self._direction or direction
                self._seen = set()
        self.position = self.step
        self.steps = self.total = steps


@dataclass
class Context:
    """What the layers of one denoiser share: where the run stands, and the record of what happens.

    `schedule` asks the pipeline, where there is one, for its list of timesteps and how many of them it runs.
    """

    clock: Clock
    recorder: Recorder
    schedule: Callable[[], tuple[Schedule | None, int | None]]


def _one_element(timestep: torch.Tensor | float) -> TypeGuard[torch.Tensor]:
    """Whether this is one timestep, possibly expanded over the batch, and so may be a view into a list."""
    return isinstance(timestep, torch.Tensor) and (timestep.numel() == 1 or not any(timestep.stride()))


def _value(timestep: torch.Tensor | float | None) -> float:
    if timestep is None:
        return float("nan")
    # Some models get one timestep per token: the largest is the step's own.
    return float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)
