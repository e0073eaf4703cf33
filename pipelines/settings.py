"""Method settings as text (`--set windows=2,2`) turned into the method's own configuration dataclass.

What settings there are, with their types, defaults and help, is read off the configuration: nothing here or above knows
one by name.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from .errors import BadInput, near

#: The name under which a method is chosen for the job.
AUTO = "auto"
TRUE, FALSE, NONE = ("true", "yes", "on", "1"), ("false", "no", "off", "0"), ("none", "null")
# A field, or several, in the section of a docstring that describes them.
_DESCRIBED = re.compile(r"    (\w+(?:, \w+)*): (.+)")


@dataclasses.dataclass(frozen=True)
class Setting:
    """
    Attributes:
        kind: "switch" for yes or no, "choice" for one of `choices`, "text" for what `read_value` reads.
        choices: As text.
        default: Of the method; a model's preset may have another.
        help: From the docstring of the configuration.
        names_file: Its value is opened as a file, so that nobody but the user of this machine may choose it freely;
            `choices` are those that name none.
    """

    method: str
    name: str
    kind: Literal["switch", "choice", "text"]
    choices: tuple[str, ...]
    default: Any
    help: str
    names_file: bool = False

    @property
    def shown(self) -> str:
        """The default as text."""
        return shown(self.default)


def known_methods() -> dict[str, type]:
    """Method name → configuration dataclass."""
    from ..accel.methods import CONFIGS

    return dict(CONFIGS)


def settings_of(method: str) -> tuple[Setting, ...]:
    """The settings of a method, but for those that only Python can give."""
    config = known_methods()[method]
    described, usual = _described(config), config()
    files: frozenset[str] = getattr(config, "files", frozenset())
    found = []
    for name, hint in _field_types(config).items():
        options = [option for option in _options(hint) if _parser(option) is not _never]
        if not options:
            continue
        choices = tuple(choice for option in options for choice in _choices(option))
        closed = all(option is type(None) or typing.get_origin(option) is Literal for option in options)
        kind: Literal["switch", "choice", "text"] = "choice" if closed or name in files else "text"
        if options == [bool]:
            kind, choices = "switch", ("yes", "no")
        default, text = getattr(usual, name), described.get(name, "")
        found.append(Setting(method, name, kind, choices, default, text, names_file=name in files))
    return tuple(found)


def summary_of(method: str) -> str:
    """What a method does, in the words that its configuration begins with."""
    return " ".join((inspect.getdoc(known_methods()[method]) or "").partition("\n\n")[0].split())


def shown(value: Any) -> str:
    """A value as the text of which `read_value` makes it again."""
    if value is None:
        return NONE[0]
    if isinstance(value, bool):
        return TRUE[1] if value else FALSE[1]
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "()"
    return str(value)


def read_value(method: str, name: str, text: str) -> Any:
    """What `text` stands for as a setting of `method`, as `--set` reads it.

    Raises:
        BadInput: no such method or setting, or a value of another type, with what it takes.
    """
    known = known_methods()
    if method not in known:
        raise BadInput(f"unknown method {method!r}.{near(method, known)}")
    types_ = _field_types(known[method])
    if name not in types_:
        raise BadInput(f"{method} has no setting {name!r}.{near(name, types_)}")
    return _value(f"{method}, {name}: {text!r}", types_[name], text.strip())


def parse(methods: Iterable[str], settings: Iterable[str]) -> dict[str, dict[str, Any]]:
    """`["hidiffusion"], ["t1=0.4"]` → `{"hidiffusion": {"t1": 0.4}}`.

    A key that several of the methods have must name its method: `hidiffusion.t1=0.4`. "auto" has neither settings nor
    company.

    Raises:
        BadInput: unknown method or key (with near matches), or a value of the wrong type.
    """
    known = known_methods()
    chosen: dict[str, dict[str, Any]] = {}
    for name in methods:
        if name not in known and name != AUTO:
            raise BadInput(f"unknown method {name!r}.{near(name, {*known, AUTO})}")
        chosen[name] = {}
    if AUTO in chosen:
        settings = list(settings)
        _check_auto(chosen)
        if settings:
            raise BadInput(f"--set {settings[0]}: {AUTO} chooses the settings itself; name the method to set any.")
        return chosen
    fields = {name: _field_types(known[name]) for name in chosen}
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise BadInput(f"--set {setting}: write it as key=value.")
        owner, key = _owner(path.strip(), fields)
        chosen[owner][key] = _value(f"--set {setting}", fields[owner][key], text.strip())
    return chosen


def build(methods: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """The configuration objects for `{"hidiffusion": {"t1": 0.4}}`; none for "auto", which is yet to be chosen.

    Raises:
        BadInput: unknown method or key, or a value the method refuses.
    """
    if AUTO in methods:
        _check_auto(methods)
        return []
    known = known_methods()
    configs = []
    for name, values in methods.items():
        if name not in known:
            raise BadInput(f"unknown method {name!r}.{near(name, known)}")
        try:
            configs.append(known[name].from_dict(dict(values)))  # type: ignore[attr-defined]
        except (ValueError, TypeError) as error:
            raise BadInput(f"{name}: {error}") from error
    return configs


def _check_auto(methods: Mapping[str, Mapping[str, Any]]) -> None:
    """
    Raises:
        BadInput: another method is named beside it, or it is given settings.
    """
    if others := [name for name in methods if name != AUTO]:
        raise BadInput(f"method {AUTO} chooses by itself: name it alone, without {', '.join(others)}.")
    if methods[AUTO]:
        raise BadInput(f"method {AUTO} has no settings, got {', '.join(methods[AUTO])}.")


def _owner(path: str, fields: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    method, dot, key = path.rpartition(".")
    if dot and method not in fields:
        raise BadInput(f"--set {path}: --method does not name {method!r}.{near(method, fields)}")
    owners = [method] if dot else [name for name, types_ in fields.items() if key in types_]
    if not fields:
        raise BadInput(f"--set {path}: no --method to set it for.")
    if len(owners) > 1:
        raise BadInput(f"--set {path}: say which one, {' or '.join(f'{name}.{key}' for name in owners)}.")
    if not owners or key not in fields[owners[0]]:
        keys = {name for owner in owners or fields for name in fields[owner]}
        raise BadInput(f"--set {path}: no such setting.{near(key, keys)}")
    return owners[0], key


def _field_types(config: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config)
    return {field.name: hints[field.name] for field in dataclasses.fields(config) if field.init}


def _described(config: type) -> dict[str, str]:
    """Field → its lines in the section `Args:` or `Attributes:` of the docstring."""
    found: dict[str, list[str]] = {}
    inside, lines = False, []
    for line in (inspect.getdoc(config) or "").splitlines():
        if line and not line.startswith(" "):
            inside = line in ("Args:", "Attributes:")
        elif inside and (entry := _DESCRIBED.fullmatch(line)):
            lines = [entry[2]]
            found.update(dict.fromkeys(entry[1].split(", "), lines))
        elif inside:
            lines.append(line.strip())
    return {name: " ".join(lines).strip() for name, lines in found.items()}


def _choices(option: Any) -> list[str]:
    if option is type(None):
        return [NONE[0]]
    return [str(choice) for choice in typing.get_args(option)] if typing.get_origin(option) is Literal else []


def _value(where: str, hint: Any, text: str) -> Any:
    """`text` as the first of the types in `hint` that takes it."""
    for option in _options(hint):
        try:
            return _parser(option)(text)
        except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
            continue
    raise BadInput(f"{where}: expected {_describe(hint)}.")


def _options(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = [option for part in typing.get_args(hint) for option in _options(part)]
        # Narrow types first, or every value would be a string.
        return sorted(options, key=lambda option: (option is str, option is float, typing.get_origin(option) is None))
    return [hint]


def _parser(option: Any) -> Callable[[str], Any]:
    if option is type(None):
        return lambda text: dict.fromkeys(NONE)[text.lower()]
    if option is bool:
        return lambda text: {**dict.fromkeys(TRUE, True), **dict.fromkeys(FALSE, False)}[text.lower()]
    if option in (int, float, str):
        return option
    if typing.get_origin(option) is tuple:
        return lambda text: _tuple(text, typing.get_args(option))
    if typing.get_origin(option) is typing.Literal:
        return lambda text: {str(choice): choice for choice in typing.get_args(option)}[text]
    return _never  # a callable, for instance: settable from Python only


def _never(text: str) -> Any:
    raise ValueError(text)


def _tuple(text: str, parts: tuple[Any, ...]) -> tuple[Any, ...]:
    values = ast.literal_eval(text)
    values = tuple(values) if isinstance(values, list | tuple) else (values,)
    if parts[-1] is not Ellipsis and len(values) != len(parts):
        raise ValueError(text)
    if parts[-1] is Ellipsis:
        parts = parts[:1] * len(values)
    for value, part in zip(values, parts, strict=True):
        allowed = _options(part)
        if not (
            type(value) in allowed or (isinstance(value, int) and not isinstance(value, bool) and float in allowed)
        ):
            raise ValueError(text)
    return values


def _describe(hint: Any) -> str:
    names = []
    for option in _options(hint):
        if typing.get_origin(option) is typing.Literal:
            names += [str(choice) for choice in typing.get_args(option)]
        elif option is type(None):
            names.append("none")
        elif option is bool:
            names.append("true or false")
        elif typing.get_origin(option) is tuple:
            parts = typing.get_args(option)
            kinds = ", ".join("…" if part is Ellipsis else _describe(part) for part in parts)
            names.append(f"values separated by commas ({kinds})")
        elif option in (int, float, str):
            names.append({int: "a whole number", float: "a number", str: "text"}[option])
    return " or ".join(names) or "a value that only Python can give"
