"""What can go wrong when attention is swapped, as types a caller can catch."""

from __future__ import annotations


class UnsupportedModel(ValueError):
    """The method cannot apply to any layer of this model; the message names the model and what is supported."""


class AttnswapWarning(UserWarning):
    """Something ran differently from what was asked; said once, and kept in `Handle.report()`."""
