"""`--set key=value` becomes what the field of the configuration wants, or one line that says what it wants."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
from attnswap.pipelines import settings
from attnswap.pipelines.errors import BadInput


@dataclass(frozen=True)
class Alpha:
    """Windows that move
    from step to step.

    More on it.

    Attributes:
        windows: along height and width, which may
            take a second line.
        steps, eps: both of them.

    Raises:
        ValueError: for nothing.
    """

    files: ClassVar[frozenset[str]] = frozenset({"weights"})

    windows: tuple[int, int] = (2, 2)
    steps: tuple[int | float, ...] = (10, 0.5)
    fast: bool = True
    eps: float = 1e-4
    t1: float | None = None
    aggressive: bool | float | None = None
    shift: Literal["step", "layer"] | Callable[[int], int] = "step"
    weights: Literal["auto"] | str | None = "auto"
    when: Callable[[int], bool] | None = None
    only_python: Callable[[int], bool] = bool

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


def test_a_setting_says_how_it_may_be_given() -> None:
    found = {setting.name: setting for setting in settings.settings_of("alpha")}
    assert {name: (setting.kind, setting.choices) for name, setting in found.items()} == {
        "windows": ("text", ()),
        "steps": ("text", ()),
        "fast": ("switch", ("yes", "no")),
        "eps": ("text", ()),
        "t1": ("text", ("none",)),
        "aggressive": ("text", ("none",)),
        "shift": ("choice", ("step", "layer")),
        "weights": ("choice", ("auto", "none")),
        "when": ("choice", ("none",)),
    }
    assert [name for name, setting in found.items() if setting.names_file] == ["weights"]


def test_what_only_python_can_give_is_no_setting() -> None:
    assert "only_python" not in [setting.name for setting in settings.settings_of("alpha")]


def test_help_comes_from_the_docstring() -> None:
    found = {setting.name: setting.help for setting in settings.settings_of("alpha")}
    assert found["windows"] == "along height and width, which may take a second line."
    assert found["steps"] == found["eps"] == "both of them."
    assert found["fast"] == ""
    assert settings.summary_of("alpha") == "Windows that move from step to step."


def test_defaults_are_shown_as_they_are_written() -> None:
    shown = {setting.name: setting.shown for setting in settings.settings_of("alpha")}
    assert (shown["windows"], shown["fast"], shown["t1"], shown["shift"]) == ("2, 2", "yes", "none", "step")


@pytest.mark.parametrize(
    ("name", "value"),
    [("windows", (4, 2)), ("steps", ()), ("steps", (10,)), ("fast", False), ("t1", None), ("aggressive", 0.16)],
)
def test_what_is_shown_is_read_again(name: str, value: object) -> None:
    assert settings.read_value("alpha", name, settings.shown(value)) == value


def test_a_single_value_that_is_none_names_its_setting_and_what_it_takes() -> None:
    with pytest.raises(BadInput, match="alpha, t1: 'much': expected none or a number"):
        settings.read_value("alpha", "t1", "much")
    with pytest.raises(BadInput, match=r"no setting 't2'\. Did you mean t1"):
        settings.read_value("alpha", "t2", "1")
    with pytest.raises(BadInput, match="unknown method 'gamma'"):
        settings.read_value("gamma", "t1", "1")


def test_every_setting_of_every_method_has_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for method, config in settings.known_methods().items():
        found = settings.settings_of(method)
        assert {setting.name for setting in found} == {field.name for field in dataclasses.fields(config)}
        assert [setting.name for setting in found if not setting.help] == []
        assert settings.summary_of(method)


def test_every_default_of_every_method_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for method in settings.known_methods():
        for setting in settings.settings_of(method):
            assert settings.read_value(method, setting.name, setting.shown) == setting.default


def test_no_setting_takes_any_text_but_those_declared_to_name_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for method, config in settings.known_methods().items():
        hints = typing.get_type_hints(config)
        names = [field.name for field in dataclasses.fields(config)]
        free = {name for name in names if str in (hints[name], *typing.get_args(hints[name]))}
        assert free == {setting.name for setting in settings.settings_of(method) if setting.names_file}, method
