"""What can go wrong when attention is swapped, as types a caller can catch."""

from __future__ import annotations


class UnsupportedModel(ValueError):
    """A method, or several together, cannot apply to any layer of this model; the message names what is supported."""


class WeightsError(ValueError):
    """A method's weights cannot be found, read or do not fit the model; one line with what was expected and found."""


class AttnswapWarning(UserWarning):
    """Something ran differently from what was asked; said once, and kept in `Handle.report()`."""
