"""When the parts of the resolution-aware U-Net act: the published table, row by row."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import product

import pytest
from attnswap.accel.methods.hidiffusion_schedule import FAMILIES, is_large, phases, shift_quarters

NEVER = (0, 0)


def ranges(family: str, steps: int, **flags: object) -> tuple[tuple[int, int], tuple[int, int]]:
    found = phases(family, steps=steps, **{"large": False, "aggressive": True, **flags})  # type: ignore[arg-type]
    return found.conv, found.pool


@pytest.mark.parametrize(
    ("family", "flags", "conv", "pool"),
    [
        ("sd15", {}, (0, 20), NEVER),
        ("sd15", {"large": True}, (0, 35), (0, 15)),
        ("sdxl", {}, (0, 8), (8, 20)),
        ("sdxl", {"aggressive": False}, NEVER, (0, 20)),
        ("sdxl", {"text_controlnet": True}, (0, 8), (8, 25)),
        ("sdxl", {"text_controlnet": True, "aggressive": False}, NEVER, (0, 25)),
        ("sdxl", {"large": True}, (0, 15), (0, 35)),
        ("sdxl", {"large": True, "aggressive": False}, (0, 15), (0, 35)),
        ("sdxl", {"large": True, "text_controlnet": True}, (0, 15), (0, 35)),
        ("sdxl-turbo", {}, NEVER, (0, 25)),
        ("sdxl-turbo", {"large": True, "aggressive": False}, NEVER, (0, 25)),
    ],
)
def test_the_published_ranges_at_fifty_steps(
    family: str, flags: dict[str, object], conv: tuple[int, int], pool: tuple[int, int]
) -> None:
    assert ranges(family, 50, **flags) == (conv, pool)


@pytest.mark.parametrize("steps", [90, 170, 180, 330])
def test_bounds_are_truncated_in_double_precision_as_published(steps: int) -> None:
    """0.7 N falls just below the whole number that exact arithmetic gives."""
    exact = int(steps * Fraction(7, 10))
    assert ranges("sd15", steps, large=True)[0] == (0, exact - 1)
    assert ranges("sdxl", steps, large=True)[1] == (0, exact - 1)


def test_the_aggressive_bound_is_eight_fiftieths_truncated() -> None:
    assert [ranges("sdxl", steps)[0][1] for steps in (6, 7, 12, 13, 25, 30, 49, 50)] == [0, 1, 1, 2, 4, 4, 7, 8]


@pytest.mark.parametrize(
    ("family", "steps", "conv", "pool"),
    [
        ("sdxl", 1, NEVER, NEVER),
        ("sdxl", 2, NEVER, NEVER),
        ("sdxl", 4, NEVER, (0, 1)),
        ("sd15", 1, NEVER, NEVER),
        ("sd15", 2, NEVER, NEVER),
        ("sd15", 4, (0, 1), NEVER),
        ("sdxl-turbo", 1, NEVER, NEVER),
        ("sdxl-turbo", 2, NEVER, (0, 1)),
        ("sdxl-turbo", 4, NEVER, (0, 2)),
    ],
)
def test_few_steps_as_published(family: str, steps: int, conv: tuple[int, int], pool: tuple[int, int]) -> None:
    assert ranges(family, steps) == (conv, pool)


@pytest.mark.parametrize(
    ("family", "steps", "conv", "pool"),
    [
        ("sd15", 1, (0, 1), NEVER),
        ("sd15", 4, (0, 2), NEVER),
        ("sdxl", 1, (0, 1), (1, 1)),
        ("sdxl", 4, (0, 1), (1, 2)),
        ("sdxl-turbo", 1, NEVER, (0, 1)),
        ("sdxl-turbo", 4, NEVER, (0, 2)),
    ],
)
def test_rounding_up_gives_few_step_models_their_share(
    family: str, steps: int, conv: tuple[int, int], pool: tuple[int, int]
) -> None:
    assert ranges(family, steps, round_up=True) == (conv, pool)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_range_leaves_the_run(family: str) -> None:
    for steps, large, round_up in product(range(1, 60), (False, True), (False, True)):
        for first, last in ranges(family, steps, large=large, round_up=round_up, t1=1.0, t2=1.0):
            assert 0 <= first <= last <= steps


def test_t1_and_t2_replace_the_ratios_of_their_place() -> None:
    assert ranges("sd15", 10, t1=0.6, t2=0.2) == ((0, 6), (0, 2))
    assert ranges("sd15", 10, large=True, t2=0.5) == ((0, 7), (0, 5))
    assert ranges("sdxl", 10, aggressive=False, t1=0.8, t2=0.3) == ((0, 3), (0, 8))
    assert ranges("sdxl", 50, t1=0.6) == ((0, 8), (8, 30))
    assert ranges("sdxl", 50, large=True, t1=1.0, t2=0.0) == (NEVER, (0, 50))
    assert ranges("sdxl-turbo", 4, t1=1.0) == (NEVER, (0, 4))


def test_an_aggressive_fraction_replaces_eight_fiftieths() -> None:
    assert ranges("sdxl", 50, aggressive=0.3) == ((0, 15), (15, 20))
    assert ranges("sdxl", 50, aggressive=0.0) == (NEVER, (0, 20))


def test_the_pooled_range_is_empty_and_not_negative_when_the_convolution_lasts_longer() -> None:
    assert ranges("sdxl", 50, aggressive=0.9) == ((0, 45), (45, 45))


@pytest.mark.parametrize(
    ("family", "size", "large"),
    [
        ("sd15", (256, 256), True),
        ("sd15", (255, 512), False),
        ("sd15", (512, 255), False),
        ("sdxl", (512, 512), True),
        ("sdxl", (256, 512), False),
        ("sdxl", (511, 600), False),
    ],
)
def test_both_sides_must_be_large_for_the_large_schedule(family: str, size: tuple[int, int], large: bool) -> None:
    assert is_large(family, size, None) is large


def test_large_side_moves_the_border() -> None:
    assert is_large("sd15", (32, 40), 32)
    assert not is_large("sd15", (31, 40), 32)


def test_shifts_are_uniform_over_steps_and_over_layers() -> None:
    by_step = Counter(shift_quarters(0, step) for step in range(4000))
    by_layer = Counter(shift_quarters(0, 3, f"layer {i}") for i in range(4000))
    for counts in (by_step, by_layer):
        assert sorted(counts) == [0, 1, 2, 3]
        assert all(abs(count - 1000) < 150 for count in counts.values())  # five standard deviations


def test_a_shift_is_fixed_by_seed_step_and_layer() -> None:
    # Written out, so that pictures stay the same from one version to the next.
    assert [shift_quarters(0, step) for step in range(12)] == [0, 3, 3, 3, 0, 0, 2, 3, 2, 2, 3, 1]
    assert [shift_quarters(7, step) for step in range(12)] != [shift_quarters(0, step) for step in range(12)]
