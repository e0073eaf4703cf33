"""Which stages a route runs: sizes and strengths, nothing of models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import BadInput

# Published strengths. The ladder's by stage; those of super-resolution by how often the side doubles (the last is
# repeated in both); of its ladder the first, which falls evenly to zero.
ROUTES: dict[str, tuple[float, ...]] = {
    "direct": (),
    "ladder": (0.4, 0.3, 0.2, 0.1),
    "superres": (0.32, 0.24, 0.16, 0.08),
    "superres-ladder": (0.32,),
    "windows": (),
}
#: What they are, in a line each.
DESCRIBED = {
    "direct": "one run at the size asked for",
    "ladder": "a base near the native size, then image-to-image in stages",
    "superres": "a base, enlarged once, its layout kept (SD 1.5, 2.1, XL)",
    "superres-ladder": "the same in stages (SD 1.5, 2.1, XL)",
    "windows": "clips longer than native, in overlapping windows of time",
}
# For clips; the others are for pictures.
CLIP_ROUTES = ("direct", "windows")


#: Steps of a whole run, strength → steps that image-to-image really runs.
StepsRun = Callable[[int, float], int]


def rounded_down(steps: int, strength: float) -> int:
    """As the image-to-image pipelines of U-Nets in Diffusers."""
    return min(int(steps * strength), steps)


def rounded_up(steps: int, strength: float) -> int:
    """As those of transformers: Stable Diffusion 3, FLUX, Qwen-Image, Z-Image."""
    return steps - int(max(steps - steps * strength, 0))


def every(steps: int, strength: float) -> int:
    """As latent consistency models, which space all steps over the part of the schedule that is left."""
    return steps


@dataclass(frozen=True)
class Stage:
    """One run of the denoiser on the way to the picture or clip.

    Attributes:
        number: From 1, of `total`.
        width: Pixels, as `height`.
        steps: Denoising steps that are really run.
        strength: How much of the schedule is run; None starts from noise.
        scale: Whole multiple of the base's side, as dilation of the second branch; 1 has none.
    """

    number: int
    total: int
    width: int
    height: int
    steps: int
    strength: float | None = None
    scale: int = 1

    def __str__(self) -> str:
        strength = "" if self.strength is None else f", strength {self.strength:g}"
        return f"stage {self.number}/{self.total}: {self.width}x{self.height}{strength}, {self.steps} steps"


def plan(
    route: str,
    size: tuple[int, int],
    *,
    native: int,
    multiple: int,
    steps: int,
    strengths: Sequence[float] | None = None,
    preset: Mapping[str, Sequence[float]] | None = None,
    steps_run: StepsRun = rounded_down,
) -> tuple[Stage, ...]:
    """The stages of a route, the base first, the last of exactly the size asked for.

    Args:
        route: a key of `ROUTES`.
        size: width and height in pixels.
        native: side in pixels the model was trained at; 0 where it does not say.
        multiple: pixels of which every width and height must be multiples.
        steps: of a whole run.
        strengths: one a stage above the base; None takes the preset's, else the published ones.
        preset: the model's own in place of those in `ROUTES`.
        steps_run: of its image-to-image form, for the ladder.

    Raises:
        BadInput: the size is not above the native one, or the strengths are none, with the numbers in it.
    """
    width, height = size
    if route not in ROUTES:
        raise BadInput(f"no route {route!r}: there is {', '.join(ROUTES)}.")
    if route in CLIP_ROUTES:
        if strengths is not None:
            raise BadInput(f"--strengths {_listed(strengths)}: there is no --route to use them.")
        return (Stage(1, 1, width, height, steps),)
    if not native:
        raise BadInput(f"--route {route}: the model does not say its native size, from which the route starts.")
    base = base_size(size, native, multiple)
    if base == size:
        raise BadInput(
            f"--route {route}: {width}x{height} is not above the native size, {native}x{native}; leave --route out."
        )
    sizes = [size] if route == "superres" else _climb(base, size, multiple)
    if strengths is None:
        schedule = (preset or {}).get(route, ROUTES[route])
        strengths = _usual(route, schedule, len(sizes), _ratio(base, size), steps, steps_run)
    _check(strengths, sizes, steps, steps_run if route == "ladder" else None)
    total = 1 + len(sizes)
    stages = [Stage(1, total, *base, steps)]
    for number, ((w, h), strength) in enumerate(zip(sizes, strengths, strict=True), start=2):
        if route == "ladder":
            stages.append(Stage(number, total, w, h, steps_run(steps, strength), strength))
        else:
            # Rounded up as published, but for what the sides of base and stage were rounded by.
            scale = max(2, math.ceil(_ratio(base, (w, h)) - 0.1))
            stages.append(Stage(number, total, w, h, math.ceil(steps * strength - 1e-6), strength, scale))
    return tuple(stages)


def base_size(size: tuple[int, int], native: int, multiple: int) -> tuple[int, int]:
    """A size of about the native area and the aspect ratio of `size`, never larger than that."""
    ratio = max(1.0, math.sqrt(size[0] * size[1]) / native)
    # Rounded up: twice the native side is then never a little more than twice the base.
    return _up(size[0] / ratio, multiple), _up(size[1] / ratio, multiple)


def _climb(base: tuple[int, int], size: tuple[int, int], multiple: int) -> list[tuple[int, int]]:
    """Sizes in even ratios, none above 2: with both rounded up, twice the one before is never less than the next."""
    count = math.ceil(math.log2(_ratio(base, size)) - 1e-9)

    def side(axis: int, stage: int) -> int:
        return _up(base[axis] * (size[axis] / base[axis]) ** (stage / count), multiple)

    return [(side(0, stage), side(1, stage)) for stage in range(1, count)] + [size]


def _ratio(base: tuple[int, int], size: tuple[int, int]) -> float:
    return max(size[0] / base[0], size[1] / base[1])


def _up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple - 1e-6) * multiple


def _usual(
    route: str, schedule: Sequence[float], count: int, ratio: float, steps: int, steps_run: StepsRun
) -> list[float]:
    if route == "superres-ladder":
        return [schedule[0] * (count - stage) / count for stage in range(count)]
    if route == "superres":
        doublings = max(1, math.ceil(math.log2(ratio) - 1e-9))
        return [schedule[min(doublings, len(schedule)) - 1]]
    usual = [schedule[min(stage, len(schedule) - 1)] for stage in range(count)]
    # A run of few steps must still have one.
    return [strength if steps_run(steps, strength) else one_step(steps) for strength in usual]


def one_step(steps: int) -> float:
    """A strength, in thousandths, at which every pipeline runs a step."""
    return math.ceil(1000 / steps) / 1000


def _check(
    strengths: Sequence[float], sizes: Sequence[tuple[int, int]], steps: int, steps_run: StepsRun | None
) -> None:
    where = f"--strengths {_listed(strengths)}"
    if len(strengths) != len(sizes):
        names = ", ".join(f"{w}x{h}" for w, h in sizes)
        raise BadInput(f"{where}: {len(strengths)} given, {len(sizes)} needed, one for each of {names}.")
    for strength in strengths:
        if not 0 < strength <= 1:
            raise BadInput(f"{where}: {strength:g} is out of range: above 0, at most 1.")
        if steps_run and not steps_run(steps, strength):
            raise BadInput(
                f"{where}: {strength:g} of {steps} steps is less than one step; {one_step(steps):g} is enough."
            )


def _listed(strengths: Sequence[float]) -> str:
    return ",".join(f"{strength:g}" for strength in strengths)
