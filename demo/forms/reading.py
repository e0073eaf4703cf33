"""Values as a page sends them, or any client of its endpoints: checked, and called what the page calls them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from ...pipelines import clip
from ...pipelines.errors import BadInput, near
from ...pipelines.printable import printable

# What the flags of the command line are on the page.
LABELS = {
    "prompt": "Prompt",
    "negative": "Negative prompt",
    "model": "Model",
    "method": "Method",
    "width": "Width",
    "height": "Height",
    "route": "Route",
    "steps": "Steps",
    "guidance": "Guidance",
    "true-cfg": "True guidance",
    "seed": "Seed",
    "frames": "Frames",
    "fps": "Frames per second",
    "window": "Window",
    "overlap": "Overlap",
    "image": "Picture",
    "strength": "Strength",
}
# The characters of a value in a message.
SHOWN = 60
LARGEST = 2**63
# Characters that Markdown would take for its own, and of an address what it would take for a link.
_MARKUP = str.maketrans({character: f"\\{character}" for character in "\\`*_[]<>#|~$@"})
_LINK = re.compile(r"\b(https?|ftp)(?=://)|\bwww(?=\.)", re.IGNORECASE)
_FLAG = re.compile(r"--([a-z]+(?:-[a-z]+)*)")
# Of messages of the pipelines, what only the operator of a server can do, and what it is on the page.
_ELSEWHERE = (
    (", fewer frames, --low-memory, --vae-tiling or --cpu-offload model", " or fewer frames"),
    (", --low-memory, --vae-tiling or --cpu-offload model", ""),
    (" Try --dtype float32.", ""),
    (" (--set)", ""),
    ("; leave --route out", "; choose a larger size, or the route direct"),
)


def in_words(message: str) -> str:
    """A message of the pipelines with the labels of controls in place of the flags that do the same.

    What only the operator of the server could do is left out.
    """
    for flags, words in _ELSEWHERE:
        message = message.replace(flags, words)
    return _FLAG.sub(lambda flag: f"“{LABELS[flag[1]]}”" if flag[1] in LABELS else flag[0], message)


def plain(text: str) -> str:
    """Markdown that shows `text` as it is: no pictures, which a browser would fetch, and no links."""
    return _LINK.sub(r"\g<0>\\", text.translate(_MARKUP))


def cut(text: str) -> str:
    """For a message."""
    return printable(text, SHOWN)


def text(value: Any, label: str) -> str:
    """
    Raises:
        BadInput: as all here: not what it should be, with the label of the control.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadInput(f"{label}: expected text, got {shown(value)}.")
    return value


def number(value: Any, label: str) -> float | None:
    """None where the control is empty."""
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(bounded(value, label)):
        raise BadInput(f"{label}: expected a number, got {shown(value)}.")
    return float(value)


def whole(value: Any, label: str) -> int | None:
    """None where the control is empty. Browsers send 12.0 for 12."""
    if value is None or value == "":
        return None
    number_ = isinstance(value, int | float) and not isinstance(value, bool)
    if not number_ or not math.isfinite(bounded(value, label)) or value != int(value):
        raise BadInput(f"{label}: expected a whole number, got {shown(value)}.")
    return int(bounded(int(value), label))


def one_of(value: Any, label: str, choices: Sequence[str]) -> str:
    """The first where the control is empty."""
    chosen = text(value, label) or choices[0]
    if chosen not in choices:
        raise BadInput(f"{label}: {shown(chosen)} is not offered.{near(chosen[:SHOWN], choices)}")
    return chosen


def file(value: Any, label: str) -> str | None:
    """The path of an upload, which Gradio has seen to be in its cache: as it is, or as `preprocess=False` leaves it."""
    if isinstance(value, dict):
        value = value.get("path")
    return text(value, label) or None


def bounded(value: float, label: str) -> float:
    """`value`, which an endless row of digits could be: no float holds it, nor may it be written out."""
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise BadInput(f"{label}: the number is too large.")
    return value


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes or no"
    if isinstance(value, str | float):
        return printable(repr(value), SHOWN)
    return {list: "a list", dict: "an object", int: "a number"}.get(type(value), "something else")


def label(name: str) -> str:
    """What the page calls the control of a field of `Job`."""
    return LABELS[name.replace("_", "-")]


def rate(value: Any) -> Fraction | None:
    """Frames a second, exactly; None where the value is empty.

    Raises:
        BadInput: it is none.
    """
    if value is None or value == "":
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = f"{number(value, label('fps')):g}"
    given = text(value, label("fps"))
    if len(given) > SHOWN:
        raise BadInput(f"{label('fps')}: {shown(given)} is no number such as 16, 23.976 or 24000/1001.")
    return clip.parse_fps(given)
