"""`attnswap show`: what a picture or clip says of how it was made."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import textwrap
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from .common import fail

# Of a record, which anybody may have written: the numbers are JSON's.
Record = dict[str, Any]
NUMBER = (int, float)

PROMPT, TEXT = 500, 200
LABEL, WIDTH = 11, 100


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "show",
        help="show how a picture or clip was made",
        description="Show what a PNG, MP4 or GIF made by attnswap says of how it was made.",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="PNG, MP4 or GIF")
    parser.add_argument("--json", action="store_true", help="everything, as JSON; several files by their names")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..pipelines import save
    from ..pipelines.errors import BadInput
    from ..pipelines.printable import printable

    shown: dict[str, str] = {}
    status = 0
    for file in options.files:
        try:
            record = save.read_record(Path(file))
            shown[file] = _json(record) if options.json else _screen(file, record)
        except BadInput as error:
            status = fail(str(error), 2)
        except RecursionError:
            status = fail(f"{file}: its attnswap metadata is nested too deep.", 2)
    if len(options.files) == 1:
        print("\n".join(shown.values()), end="\n" if shown else "")
    elif options.json:
        print("{\n" + ",\n".join(f"{_json(file)}: {text}" for file, text in shown.items()) + "\n}")
    else:
        print("\n\n".join(f"{printable(file)}\n{text}" for file, text in shown.items()))
    return status


def _json(document: Any) -> str:
    """With what does not belong on a terminal as JSON's own escapes."""
    from ..pipelines.printable import is_printable

    text = json.dumps(document, indent=2, ensure_ascii=False)
    return "".join(
        character if character == "\n" or is_printable(character) else json.dumps(character)[1:-1] for character in text
    )


def _screen(file: str, record: Record) -> str:
    from ..pipelines.printable import printable

    width = max(40, min(shutil.get_terminal_size().columns, WIDTH))
    lines = []
    for label, text in _rows(record):
        first = f"{label:<{LABEL}}"
        lines += textwrap.wrap(
            printable(text), width, initial_indent=first, subsequent_indent=" " * LABEL, break_on_hyphens=False
        )
    # Not wrapped, so that it can be copied.
    return "\n".join([*lines, f"{'again':<{LABEL}}{printable(f'attnswap generate {_from(file)}')}"])


def _from(file: str) -> str:
    """As a shell takes it; a name that begins with "-" would be taken for a flag if it stood alone."""
    return f"--from={shlex.quote(file)}" if file.startswith("-") else f"--from {shlex.quote(file)}"


def _rows(record: Record) -> Iterator[tuple[str, str]]:
    """Label and text, for what the record says and says in the right type."""
    job = _get(record, "job", dict)
    stage = _get(record, "stage", int)
    if job is not None and stage is not None:
        yield "stage", f"the picture after stage {stage} of this:"
        record = job
    for label, text_of in _ROWS.items():
        if text := text_of(record):
            yield label, text


def _prompt(record: Record, name: str = "prompt") -> str:
    text = _get(record, name, str) or ""
    return text if len(text) <= PROMPT else f"{text[:PROMPT]}… ({len(text)} characters; all of it with --json)"


def _model(record: Record) -> str:
    variant = _get(record, "variant", str)
    return _listed(_text(record, "model"), variant and f"variant {_cut(variant)}", _text(record, "dtype"))


def _size(record: Record) -> str:
    width, height = _get(record, "width", int), _get(record, "height", int)
    frames = _get(record, "frames", int)
    size = f"{_cut(width)}x{_cut(height)}" if width is not None and height is not None else ""
    return _listed(size, frames is not None and _frames(frames, _get(record, "fps", str)))


def _frames(frames: int, fps: str | None) -> str:
    from ..pipelines.clip import parse_fps
    from ..pipelines.errors import BadInput

    count = f"{_cut(frames)} frame{'' if frames == 1 else 's'}"
    try:
        rate: Fraction | None = parse_fps(fps) if fps else None
    except BadInput:
        rate = None
    if rate is None or not 0 < frames < 10**9:
        return count
    return f"{count} at {rate} a second ({float(frames / rate):.1f} s)"


def _steps(record: Record) -> str:
    named = {"steps": "{}", "guidance": "guidance {}", "true_cfg": "true CFG {}", "seed": "seed {}"}
    found = {name: _get(record, name, *NUMBER) for name in named}
    return _listed(*(text.format(_cut(found[name])) for name, text in named.items() if found[name] is not None))


def _methods(record: Record) -> str:
    methods = _get(record, "methods", dict)
    if methods is None:
        return ""
    described = [f"{_cut(name)}{_settings(name, values)}" for name, values in methods.items()]
    asked = _get(_get(record, "asked", dict) or {}, "methods", dict) or {}
    return (" and ".join(described) or "none, dense attention") + (", chosen by auto" if "auto" in asked else "")


def _settings(method: str, values: Any) -> str:
    """Those that are not the method's defaults, as --set takes them."""
    if not isinstance(values, dict):
        return ""
    from ..pipelines import settings

    config: Any = settings.known_methods().get(method)
    usual = json.loads(json.dumps(config().to_dict(), default=str)) if config else {}
    changed = {key: value for key, value in values.items() if key not in usual or usual[key] != value}
    said = ", ".join(f"{_cut(key)}={_value(value)}" for key, value in changed.items())
    return f" ({_cut(said)})" if said else ""


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(_value(part) for part in value)
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return _cut(value)


def _route(record: Record) -> str:
    route = _get(record, "route", str)
    window, overlap = _get(record, "window", int), _get(record, "overlap", int)
    if route in (None, "direct"):
        return ""
    strengths = _get(record, "strengths", list)
    return _listed(
        _cut(route),
        strengths and f"strengths {_cut(_value(strengths))}",
        window is not None and f"{_cut(window)} frames in a window",
        overlap is not None and f"{_cut(overlap)} of them shared with the one before",
    )


def _image(record: Record) -> str:
    strength = _get(record, "strength", *NUMBER)
    return _listed(_text(record, "image"), strength is not None and f"strength {_cut(strength)}")


def _loras(record: Record) -> str:
    loras = [lora for lora in _get(record, "loras", list) or [] if isinstance(lora, dict)]
    return _cut(
        " and ".join(
            _listed(_text(lora, "id"), _text(lora, "weight_name"), f"scale {_cut(lora.get('scale'))}") for lora in loras
        )
    )


def _memory(record: Record) -> str:
    named = {"vae_tiling": "decoded in tiles", "low_memory": "low memory", "compile": "compiled"}
    return _listed(*(text for name, text in named.items() if record.get(name) is True))


def _batch(record: Record) -> str:
    batch = _get(record, "batch", dict) or {}
    index, company = _get(batch, "index", int), _get(batch, "of", list)
    if index is None or company is None or not 0 <= index < len(company):
        return ""
    return f"made in a batch of {len(company)}, as number {index + 1}"


def _device(record: Record) -> str:
    threads = _get(record, "threads", int)
    backend = _get(record, "backend", str)
    return _listed(
        _text(record, "device"),
        _text(record, "device_name"),
        threads is not None and f"{_cut(threads)} thread{'' if threads == 1 else 's'}",
        backend not in (None, "auto") and f"ATTNSWAP_BACKEND={_cut(backend)}",
    )


def _versions(record: Record) -> str:
    versions = _get(record, "versions", dict) or {}
    return _cut(", ".join(f"{name} {_cut(version)}" for name, version in versions.items()))


_ROWS: dict[str, Callable[[Record], str]] = {
    "prompt": _prompt,
    "negative": lambda record: _prompt(record, "negative"),
    "model": _model,
    "LoRA": _loras,
    "scheduler": lambda record: _text(record, "scheduler"),
    "image": _image,
    "size": _size,
    "steps": _steps,
    "method": _methods,
    "route": _route,
    "memory": _memory,
    "batch": _batch,
    "made on": _device,
    "versions": _versions,
}


def _get(record: Record, name: str, *kinds: type) -> Any:
    """What the record says, None where that is nothing or of another type."""
    value = record.get(name)
    return value if type(value) in kinds else None


def _text(record: Record, name: str) -> str:
    return _cut(_get(record, name, str) or "")


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= TEXT else text[:TEXT] + "…"


def _listed(*parts: str | bool | None) -> str:
    return ", ".join(part for part in parts if part and isinstance(part, str))
