"""What is compared: dense attention, and methods with their settings, each by a name of its own."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import settings
from ..errors import BadInput

LONGEST_SLUG = 48


@dataclass(frozen=True)
class Variant:
    """
    Attributes:
        name: what it is called everywhere; no two have the same.
        methods: method name → settings, as in a `Job`.
    """

    name: str
    methods: dict[str, dict[str, Any]] = field(hash=False)


DENSE = Variant("dense", {})


def parse(choices: Sequence[tuple[Sequence[str], Sequence[str]]]) -> tuple[Variant, ...]:
    """`[(["adaspa"], ["sparsity=0.8"])]`, the methods of each variant with its settings, → "adaspa sparsity=0.8".

    Raises:
        BadInput: an unknown method or setting, a variant without a method, or twice the same.
    """
    found = []
    for methods, texts in choices:
        if not methods:
            raise BadInput("--method without a name.")
        chosen = _parsed(methods, texts)
        found.append(Variant(" ".join(["+".join(chosen), *("=".join(_parts(text)) for text in texts)]), chosen))
    name, count = max(Counter(variant.name for variant in found).items(), key=lambda entry: entry[1], default=("", 0))
    if count > 1:
        raise BadInput(f"--method {name} is there {count} times; variants must differ in their settings (--set).")
    return tuple(found)


def _parsed(methods: Sequence[str], texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    if settings.AUTO not in methods:
        return settings.parse(methods, texts)
    if len(methods) > 1 or texts:
        raise BadInput("--method auto chooses methods and settings itself; it stands alone.")
    return {settings.AUTO: {}}


def _parts(setting: str) -> list[str]:
    return [part.strip() for part in setting.partition("=")[::2]]


def ids(variants: Sequence[Variant]) -> dict[str, str]:
    """A part of a file name for every variant, by its name; no two are the same."""
    found: dict[str, str] = {}
    for number, variant in enumerate(variants):
        name = slug(variant.name)
        found[variant.name] = f"{name}-{number}" if name in found.values() else name
    return found


def slug(text: str) -> str:
    """What of `text` any file system takes in a name, in lower case; may be empty."""
    words = re.sub(r"[^a-z0-9.+]+", "-", text[: 10 * LONGEST_SLUG].lower()).strip("-.")
    return words[:LONGEST_SLUG].rstrip("-.")
