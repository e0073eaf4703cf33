"""`--set key=value` becomes what the field of the configuration wants, or one line that says what it wants."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from attnswap.pipelines import settings
from attnswap.pipelines.errors import BadInput


@dataclass(frozen=True)
class Alpha:
    windows: tuple[int, int] = (2, 2)
    steps: tuple[int | float, ...] = (10, 0.5)
    fast: bool = True
    eps: float = 1e-4
    t1: float | None = None
    aggressive: bool | float | None = None
    shift: Literal["step", "layer"] | Callable[[int], int] = "step"
    weights: str | None = "auto"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Alpha:
        return cls(**values)


@dataclass(frozen=True)
class Beta:
    eps: float = 1e-4
    radius: int = 16

    def __post_init__(self) -> None:
        if self.radius < 1:
            raise ValueError(f"radius must be at least 1, not {self.radius}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Beta:
        return cls(**values)


@pytest.fixture(autouse=True)
def two_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "known_methods", lambda: {"alpha": Alpha, "beta": Beta})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("windows=4,2", (4, 2)),
        ("windows=(4, 2)", (4, 2)),
        ("windows=[4,2]", (4, 2)),
        ("steps=10,0.5,30", (10, 0.5, 30)),
        ("steps=10", (10,)),
        ("fast=false", False),
        ("fast=Yes", True),
        ("eps=1", 1.0),
        ("eps = 1e-3", 1e-3),
        ("t1=none", None),
        ("t1=null", None),
        ("t1=0.4", 0.4),
        ("aggressive=true", True),
        ("aggressive=0.16", 0.16),
        ("aggressive=none", None),
        ("shift=layer", "layer"),
        ("weights=none", None),
        ("weights=some/where=else", "some/where=else"),
        ("alpha.eps=2", 2.0),
    ],
)
def test_takes(text: str, value: object) -> None:
    (parsed,) = settings.parse(["alpha"], [text])["alpha"].values()
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "wants"),
    [
        ("windows=4", "whole number, a whole number"),
        ("windows=4,2,1", "whole number"),
        ("windows=4,2.5", "whole number"),
        ("windows=True,2", "whole number"),
        ("windows=__import__('os')", "whole number"),
        ("steps=a,b", "whole number or a number, …"),
        ("fast=2", "true or false"),
        ("eps=much", "a number"),
        ("t1=", "none or a number"),
        ("shift=never", "step or layer"),
    ],
)
def test_refuses_and_says_what_it_wants(text: str, wants: str) -> None:
    with pytest.raises(BadInput) as refusal:
        settings.parse(["alpha"], [text])
    assert f"--set {text}" in str(refusal.value)
    assert wants in str(refusal.value)


def test_a_key_of_one_method_finds_it() -> None:
    parsed = settings.parse(["alpha", "beta"], ["radius=4", "windows=1,1"])
    assert parsed == {"alpha": {"windows": (1, 1)}, "beta": {"radius": 4}}


def test_a_key_of_two_methods_must_say_which() -> None:
    with pytest.raises(BadInput, match=r"alpha\.eps or beta\.eps"):
        settings.parse(["alpha", "beta"], ["eps=1"])
    assert settings.parse(["alpha", "beta"], ["beta.eps=1"]) == {"alpha": {}, "beta": {"eps": 1.0}}


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("windws=2,2", "Did you mean windows?"),
        ("beta.radius=2", "--method does not name 'beta'"),
        ("alpha.radius=2", "no such setting"),
        ("windows", "key=value"),
        ("=2", "no such setting"),
    ],
)
def test_unknown_keys(setting: str, hint: str) -> None:
    with pytest.raises(BadInput) as refusal:
        settings.parse(["alpha"], [setting])
    assert hint in str(refusal.value)


def test_unknown_methods() -> None:
    with pytest.raises(BadInput, match=r"'alhpa'\. Did you mean alpha\?"):
        settings.parse(["alhpa"], [])
    with pytest.raises(BadInput, match="'gamma'"):
        settings.build({"gamma": {}})


def test_what_the_method_refuses_is_said_in_its_words() -> None:
    with pytest.raises(BadInput, match="beta: radius must be at least 1, not 0"):
        settings.build({"beta": {"radius": 0}})


def test_every_real_method_can_be_set_from_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for name, config in settings.known_methods().items():
        for field in dataclasses.fields(config):
            setting = f"{field.name}={getattr(config(), field.name)}"
            assert settings.build(settings.parse([name], [setting])) == [config()], setting
