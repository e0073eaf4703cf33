"""HiDiffusion (arXiv 2311.17528): a stock Stable Diffusion U-Net above its training size, without weights.

Two independent parts: the resolution-aware U-Net (RAU) lets the deep blocks see maps of the trained size early in the
run, which stops repeated objects; windowed attention (MSW-MSA) saves time in the costliest layers.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ... import kernels
from ...kernels.window_attention import window_groups
from ..context import Context
from ..families import unet_seams as seams
from ..families.base import Family, Layout, Place
from ..families.unet import Size, UNetSizes, latent_size, places_by_layer, unet_sizes
from ..observe import Call, forget_cached_features
from . import hidiffusion_schedule as schedule
from .base import Config, Strategy
from .hidiffusion_structure import Structure, structure_of
from .hidiffusion_windows import WindowPlan, run_in_windows, whole_windows

ShiftRule = Callable[[int, str], int]


@dataclass(frozen=True)
class HiDiffusion(Config):
    """A Stable Diffusion U-Net above the size it was trained for: fewer repeated objects, less work; needs no training.

    Args:
        raunet: use the resolution-aware U-Net.
        window_attention: use windows in the costliest self-attention layers.
        windows: windows along (height, width).
        shift: how windows move between steps: "step", one draw a step; "layer", one a layer and step; or a callable
            `(step, layer_name) -> 0..3` giving quarters of a window. Draws come from `seed`, from no generator.
        odd_grids: "exact" cuts sides that do not divide into uneven windows; "resize" resizes them bicubically and
            back, as the published code does.
        active_above: act when the latent's area is more than this many times the native one; 0 acts always.
        t1, t2: fractions of the steps (0 <= t2 <= t1 <= 1) in place of the family's; see docs/hidiffusion.md.
        aggressive: in SDXL at small sizes, let the deep convolution go first, or for which fraction of the steps;
            None detects (off for inpainting and Playground models).
        family: "sd15", "sdxl" or "sdxl-turbo"; None detects it from the block structure.
        seed: of the shifts.
        by: count the fractions in "steps" that are run, or by "noise", in the schedule before image-to-image
            truncation.
        round_up: round the numbers of steps up instead of down, for few-step models.
        large_side: latent side from which the schedule for very large pictures applies; None takes the published
            256 (sd15) or 512 (sdxl).
        controlnet_end: fraction of the steps in which ControlNets take part.
        controlnet_resize: "nearest" (published), "area" or "bicubic" for what ControlNets get.

    Raises:
        ValueError: for any value outside these, with the value in the message.
    """

    name: ClassVar[str] = "hidiffusion"

    raunet: bool = True
    window_attention: bool = True
    windows: tuple[int, int] = (2, 2)
    shift: Literal["step", "layer"] | ShiftRule = "step"
    odd_grids: Literal["exact", "resize"] = "exact"
    active_above: float = 1.5
    t1: float | None = None
    t2: float | None = None
    aggressive: bool | float | None = None
    family: Literal["sd15", "sdxl", "sdxl-turbo"] | None = None
    seed: int = 0
    by: Literal["steps", "noise"] = "steps"
    round_up: bool = False
    large_side: int | None = None
    controlnet_end: float = 0.6
    controlnet_resize: Literal["nearest", "area", "bicubic"] = "nearest"

    def __post_init__(self) -> None:
        if isinstance(self.family, str):
            object.__setattr__(self, "family", self.family.replace("_", "-"))
        if isinstance(self.windows, list):
            object.__setattr__(self, "windows", tuple(self.windows))
        _check_one_of("odd_grids", self.odd_grids, ("exact", "resize"))
        _check_one_of("by", self.by, ("steps", "noise"))
        _check_one_of("controlnet_resize", self.controlnet_resize, ("nearest", "area", "bicubic"))
        if not callable(self.shift):
            _check_one_of("shift", self.shift, ("step", "layer"), "or a callable (step, layer_name) -> 0..3")
        if self.family is not None:
            _check_one_of("family", self.family, schedule.FAMILIES)
        for name in ("raunet", "window_attention", "round_up"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        pair = isinstance(self.windows, tuple) and len(self.windows) == 2
        if not pair or not all(_is_int(side) and side >= 1 for side in self.windows):
            raise ValueError(f"windows must be two whole numbers of at least 1, got {self.windows!r}")
        if not _is_number(self.active_above) or not self.active_above >= 0:
            raise ValueError(f"active_above must be a number of at least 0, got {self.active_above!r}")
        if not _is_int(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number, at least 0 and below 2**63, got {self.seed!r}")
        if self.large_side is not None and (not _is_int(self.large_side) or self.large_side < 1):
            raise ValueError(f"large_side must be a latent side of at least 1, got {self.large_side!r}")
        for name in ("t1", "t2", "aggressive", "controlnet_end"):
            value = getattr(self, name)
            free = (value is None and name != "controlnet_end") or (isinstance(value, bool) and name == "aggressive")
            if not free and not (_is_number(value) and 0 <= value <= 1):
                raise ValueError(f"{name} must be a fraction between 0 and 1, got {value!r}")
        if self.t1 is not None and self.t2 is not None and self.t2 > self.t1:
            raise ValueError(f"t2 must not be above t1, got t1={self.t1}, t2={self.t2}")

    def to_dict(self) -> dict[str, Any]:
        document = super().to_dict()
        if callable(self.shift):
            document["shift"] = f"callable {getattr(self.shift, '__qualname__', type(self.shift).__name__)}"
        return document


class HiDiffusionStrategy(Strategy):
    """HiDiffusion at work on one U-Net."""

    config: HiDiffusion
    kinds: ClassVar[frozenset[str]] = frozenset({"unet"})
    yields_to: ClassVar[frozenset[str]] = frozenset({"linfusion"})
    wraps: ClassVar[bool] = True
    resizes: ClassVar[bool] = True

    def __init__(
        self, config: HiDiffusion, model: nn.Module, family: Family, context: Context, pipeline: Any = None
    ) -> None:
        super().__init__(config, model, family, context, pipeline)
        self.structure: Structure = structure_of(model, pipeline, config)
        self._raunet = False  # in place, not only asked for
        self._conv_on = False
        self._pool_on = False
        self._edits: list[Any] = []
        self._controlnet = getattr(pipeline, "controlnet", None)
        self._has_controlnet = self._controlnet is not None
        self._run: tuple[Any, ...] | None = None
        self._sizes: UNetSizes | None = None
        context.recorder.remarks["structure"] = str(self.structure)
        if not (config.raunet or config.window_attention):
            context.recorder.note("raunet and window_attention are both off: nothing is accelerated", warn=True)

    # What is accelerated.

    def select(self, layers: Mapping[str, nn.Module]) -> dict[str, str]:
        if not self.config.window_attention:
            return {}
        chosen = [name for name in layers if self.family.self_attention(name) and self.structure.is_windowed(name)]
        rows, columns = self.config.windows
        return dict.fromkeys(chosen, f"self-attention in {rows}x{columns} windows")

    def why_not(self, layer: str) -> str:
        if not self.family.self_attention(layer):
            return "not self-attention over image tokens"
        if not self.config.window_attention:
            return "windows are switched off"
        return "deeper level, where windows save little"

    # Edits beyond attention.

    def install(self, *, passive: bool) -> None:
        if passive:
            return
        self._raunet = self.config.raunet
        if self._raunet:
            down, up = self.structure.pooled_transformers(self.model)
            self._edits.append(seams.PooledSection(down, up, self._pool_is_on))
            if (downsampler := self.structure.downsampler(self.model)) is not None:
                self._edits.append(seams.QuarteringDownsampler(downsampler, self._conv_is_on))
            self._edits.append(seams.UpsampleToSkips(self.model))
        if self._controlnet is not None:
            self._edits.append(seams.ControlNetSeam(self._controlnet, self._begin_controlnet))
            self._controlnet = None  # a copy of the U-Net must not carry the weights of another model

    def beyond_attention(self) -> str:
        return "resolution-aware U-Net" if self.config.raunet else ""

    def remove(self) -> None:
        while self._edits:
            self._edits.pop().remove()
        self.reset()

    def reset(self) -> None:
        self._conv_on = self._pool_on = False
        self._run = None
        self._sizes = None

    def _conv_is_on(self) -> bool:
        return self._conv_on

    def _pool_is_on(self) -> bool:
        return self._pool_on

    # Each call.

    def begin(self, call: Call, layouts: Mapping[str, Layout]) -> None:
        size = latent_size(call.arguments)
        self._conv_on = self._pool_on = False
        if not self._is_active(size):
            self._record(size, None, "inactive: native size")
            return
        if self._raunet:
            self._set_phases(size)
        else:
            self._record(size, self.context.clock.steps, "windows only" if self.layers else "nothing: windows gave way")
        sizes = unet_sizes(
            self.model,
            size,
            quartered=self.structure.places.conv if self._conv_on else None,
            pooled=self.structure.places.pool if self._pool_on else None,
        )
        if sizes != self._sizes:
            self._sizes = sizes
            forget_cached_features(self.model)
        places = places_by_layer(self.model, sizes)
        for name, layout in layouts.items():
            layout.place = places.get(name, Place())
            if layout.grid and name in self.layers:
                layout.plan = self._window_plan(name.removesuffix(".attn1"), layout.grid)
        self._count_step(windows=any(layouts[name].plan is not None for name in self.layers if name in layouts))
        controls = ("down_block_additional_residuals", "mid_block_additional_residual")
        if self._has_controlnet and self._controlnet_has_ended() and call.first(*controls) is not None:
            for name in controls:
                call.set(name, None)
            self.context.recorder.note(f"ControlNet left out after {self.config.controlnet_end:g} of the steps")
        if changed := seams.fit_residuals(call, sizes):
            self.context.recorder.note(f"{changed} ControlNet or adapter residuals resized to the maps of this step")

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout,
        context: Context,
        *,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        plan: WindowPlan = layout.plan
        grid = layout.grid
        if torch.compiler.is_compiling():
            # As data: a number would be a new graph for every shift.
            return kernels.window_attention(query, key, value, grid=grid, windows=plan.windows, shift=plan.shift_tensor)
        if plan.backend is None:
            plan.backend = kernels.explain(
                "window_attention", query, key, value, grid=grid, windows=plan.windows
            ).backend
            context.recorder.ran_on(layout.layer, plan.backend)
        return kernels.window_attention(query, key, value, grid=grid, windows=plan.windows, shift=plan.shift)

    def around(
        self,
        run: Callable[[Tensor, Tensor | None], Tensor],
        hidden_states: Tensor,
        mask: Tensor | None,
        layout: Layout,
    ) -> Tensor:
        self.context.recorder.ran_on(layout.layer, "original processor in windows")
        return run_in_windows(run, hidden_states, mask, layout.grid, layout.plan)

    def _is_active(self, size: Size) -> bool:
        native_height, native_width = self.structure.native_size
        return size[0] * size[1] > self.config.active_above * native_height * native_width

    def _set_phases(self, size: Size) -> None:
        clock = self.context.clock
        by_noise = self.config.by == "noise"
        step, steps = (clock.position, clock.total) if by_noise else (clock.step, clock.steps)
        if step is None or steps is None:
            self.context.recorder.note(
                "the number of steps is unknown, so the resolution-aware U-Net stays off: "
                "call handle.set_timesteps(scheduler.timesteps) before the loop",
                warn=True,
            )
            self._record(size, None, "number of steps unknown")
            return
        found = self.structure.phases(self.config, size, steps)
        self._conv_on = found.conv[0] <= step < found.conv[1]
        self._pool_on = found.pool[0] <= step < found.pool[1]
        self._record(size, steps, f"{found.bucket} schedule", conv=found.conv, pool=found.pool)

    def _window_plan(self, block: str, grid: tuple[int, ...]) -> WindowPlan | None:
        rows, columns = self.config.windows
        if rows > grid[0] or columns > grid[1]:
            self.context.recorder.note(
                f"{block} ran dense: a {grid[0]}x{grid[1]} grid has no {rows}x{columns} windows", warn=True
            )
            return None
        even = whole_windows(grid, self.config.windows)
        resize = self.config.odd_grids == "resize" and even != grid
        if resize:
            self.context.recorder.note(
                f"odd grid {grid[0]}x{grid[1]} resized to {even[0]}x{even[1]} and back", warn=True
            )
        quarter = self._quarter(block)
        shift = (even[0] // rows // 4 * quarter, even[1] // columns // 4 * quarter)
        if self.config.odd_grids == "resize" and shift[0] == 0:
            shift = (0, 0)  # the published code asks only the vertical shift whether to roll
        groups = window_groups(even if resize else grid, self.config.windows)
        return WindowPlan(
            self.config.windows,
            shift,
            torch.tensor(shift),
            pairs=sum(group.count * group.length**2 for group in groups),
            around=resize,
        )

    def _quarter(self, block: str) -> int:
        step, rule = self.context.clock.step or 0, self.config.shift
        if callable(rule):
            quarter = rule(step, block)
            if not _is_int(quarter) or not 0 <= quarter <= 3:
                raise ValueError(f"shift({step}, {block!r}) must be 0, 1, 2 or 3, got {quarter!r}")
            return int(quarter)
        return schedule.shift_quarters(self.config.seed, step, block if rule == "layer" else "")

    # ControlNet.

    def _controlnet_has_ended(self) -> bool:
        step, steps = self.context.clock.step, self.context.clock.steps
        return step is not None and steps is not None and step >= self.config.controlnet_end * steps

    def _begin_controlnet(self, call: Call) -> None:
        """Run the ControlNet near its trained size, and after its last step on next to nothing."""
        pipeline_schedule, steps = self.context.schedule()
        self.context.clock.tick(call.timestep, schedule=pipeline_schedule, steps=steps)
        height, width = latent_size(call.arguments)
        if not self._is_active((height, width)):
            return
        if self._controlnet_has_ended():
            latent: Size = (8, 8)  # its residuals are dropped in `begin`
        else:
            factor = max(height, width) / schedule.NATIVE_SIDE[self.structure.family]
            latent = (max(8, int(height // factor) // 8 * 8), max(8, int(width // factor) // 8 * 8))
            if latent != (height, width):
                self.context.recorder.note(
                    f"ControlNet saw a {latent[0]}x{latent[1]} latent, near its trained size, for {height}x{width}"
                )
        pixels = (latent[0] * 8, latent[1] * 8)
        seams.resize_controlnet_input(call, latent, pixels, self.config.controlnet_resize)

    # The report.

    def _record(self, size: Size, steps: int | None, state: str, **ranges: tuple[int, int]) -> None:
        clock = self.context.clock
        run = (clock.run, size, steps, state)
        runs = self.context.recorder.runs
        if run != self._run:
            self._run = run
            runs.append({"latent": f"{size[0]}x{size[1]}", "steps": clock.steps, "state": state})
            runs[-1].update({name: list(bounds) for name, bounds in ranges.items()})
            runs[-1].update(conv_steps=0, pool_steps=0, windows_steps=0)
            self._counted: set[int] = set()

    def _count_step(self, *, windows: bool) -> None:
        step, run = self.context.clock.step, self.context.recorder.runs[-1]
        if step is not None and step not in self._counted:
            self._counted.add(step)
            run["conv_steps"] += self._conv_on
            run["pool_steps"] += self._pool_on
            run["windows_steps"] += windows


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_one_of(name: str, value: object, allowed: tuple[str, ...], also: str = "") -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}{' ' + also if also else ''}, got {value!r}")
