"""No request gets beyond what the operator allows."""

from __future__ import annotations

from typing import Any

import pytest
from attnswap.demo.server.limits import Limits
from attnswap.pipelines.errors import BadInput
from attnswap.pipelines.job import Job

LIMITS = Limits(max_size=256, max_frames=33, max_steps=20, max_prompt=10)


@pytest.mark.parametrize(
    ("field", "allowed", "refused"),
    [
        ("width", 256, 264),
        ("height", 256, 264),
        ("frames", 33, 37),
        ("window", 33, 37),
        ("steps", 20, 21),
        ("prompt", "0123456789", "0123456789!"),
        ("negative", "0123456789", "0123456789!"),
    ],
)
def test_a_limit_is_reached_and_not_passed(field: str, allowed: Any, refused: Any) -> None:
    LIMITS.check(Job(**{"prompt": "", field: allowed}))
    with pytest.raises(BadInput) as said:
        LIMITS.check(Job(**{"prompt": "", field: refused}))
    number = refused if isinstance(refused, int) else len(refused)
    limit = allowed if isinstance(allowed, int) else len(allowed)
    assert str(number) in str(said.value)
    assert str(limit) in str(said.value)
    assert "\n" not in str(said.value)


def test_what_is_left_open_passes() -> None:
    LIMITS.check(Job("a fox"))


@pytest.mark.parametrize("name", ["max_size", "max_frames", "max_steps", "max_prompt"])
def test_a_limit_of_nothing_is_none(name: str) -> None:
    with pytest.raises(BadInput, match=f"--{name.replace('_', '-')} 0 is out of range"):
        Limits(**{name: 0})


@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({"width": 832, "height": 480, "frames": 161}, True),
        ({"width": 4096, "height": 4096}, True),
        ({"width": 4096, "height": 4096, "frames": 257, "steps": 100}, False),
        ({"width": 1024, "height": 1024, "frames": 65}, False),
        ({"width": 1024, "height": 1024, "window": 65}, False),
    ],
)
def test_all_frames_together_have_a_limit(fields: dict[str, int], fits: bool) -> None:
    job = Job("", **fields)  # type: ignore[arg-type]
    if fits:
        Limits().check(job)
    else:
        with pytest.raises(BadInput, match=r"by \d+ frames are [\d.,]+ million pixels; this server makes 67.1 million"):
            Limits().check(job)
