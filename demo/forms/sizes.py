"""The sizes that a form proposes for a model: its native one, and multiples of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..server.shelf import Offer

# How often the native side.
FACTORS = (1, 2, 3, 4, 6, 8)
NATIVE, OWN = "native", "own"
# Pixels a side, up to which a picture that is larger than the model's native size takes seconds on any machine.
QUICK = 256


def presets(offer: Offer, largest: int) -> list[tuple[int, int, int]]:
    """Factor, width and height of those of at most `largest` pixels a side; none where the model has no native size."""
    native = offer.native
    if native.width is None or native.height is None:
        return []
    sizes = [(factor, native.width * factor, native.height * factor) for factor in FACTORS]
    return [each for each in sizes if max(each[1:]) <= largest]


def above(offer: Offer, largest: int) -> tuple[int | None, int | None]:
    """Width and height of the first above the native one, where it is quick; else None for both."""
    found = [size for factor, *size in presets(offer, min(QUICK, largest)) if factor > 1]
    return (found[0][0], found[0][1]) if found and not offer.clips else (None, None)


def choice(offer: Offer, largest: int, width: int | None, height: int | None) -> dict[str, Any]:
    """Of the control of sizes: what can be chosen, and what a width and height are of it; None for the native ones."""
    native = offer.native
    if native.width is None or native.height is None:
        return {"visible": False, "choices": [], "value": None}
    choices = [
        (f"native {wide}×{high}", NATIVE) if factor == 1 else (f"{factor}× {wide}×{high}", f"{wide}x{high}")
        for factor, wide, high in presets(offer, largest)
    ]
    wide, high = width or native.width, height or native.height
    now = NATIVE if (wide, high) == (native.width, native.height) else f"{wide}x{high}"
    chosen = now if now in [value for _, value in choices] else OWN
    return {"visible": True, "choices": [*choices, ("other width and height", OWN)], "value": chosen}


def given(width: Any, height: Any) -> tuple[int | None, int | None]:
    """Of what the page sends of the two: those that are sizes."""
    wide, high = (int(side) if isinstance(side, int | float) and side > 0 else None for side in (width, height))
    return wide, high


def left_out(offer: Offer, largest: int) -> dict[str, Any]:
    """Of the line that says so where some are beyond the limit."""
    some = offer.native.width is not None and len(presets(offer, largest)) < len(FACTORS)
    return {"value": f"This server allows at most {largest} pixels a side.", "visible": some}
