"""AdaSpa in compiled graphs: one opaque operator, so that no graph depends on a step, a layer or what a search found.

What a layer does in a call is decided outside graphs and remembered in Python objects. A graph that read these would be
another one for each step and each layer. An operator takes tensors only, so each layer has a number in a tensor, its
seat, by which the operator finds it when the graph runs.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor


class Attends(Protocol):
    """A layer at work outside graphs."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor: ...


class Seat:
    """The place of a layer in compiled graphs, as long as somebody keeps it.

    Attributes:
        number: 0-d int64 on the CPU.
        attend: what the operator does for it.
    """

    def __init__(self, attend: Attends) -> None:
        self.attend = attend
        self._take()

    def __getstate__(self) -> dict[str, Any]:
        return {"attend": self.attend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied or unpickled model works for itself.
        self.attend = state["attend"]
        self._take()

    def _take(self) -> None:
        number = next(_NUMBERS)
        self.number = torch.tensor(number)
        _SEATS[number] = self


# An address book, not state: entries live as long as the models they belong to.
_NUMBERS = itertools.count()
_SEATS: weakref.WeakValueDictionary[int, Seat] = weakref.WeakValueDictionary()

# Recorded once and replayed, a search would never be repeated and no step be sparse.
_TAGS = tuple(tag for tag in (getattr(torch.Tag, "cudagraph_unsafe", None),) if tag is not None)


@torch.library.custom_op(
    "attnswap::adaspa_v1",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor seat) -> Tensor",
    tags=_TAGS,
)
def attend_in_graph(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, seat: Tensor) -> Any:
    """Attention `[B, S, H, D]`, contiguous, of the layer whose number is in `seat`."""
    return _SEATS[int(seat)].attend(query, key, value, key_mask).contiguous()


@attend_in_graph.register_fake
def _(query: Tensor, *rest: Any) -> Tensor:
    return query.new_empty(query.shape)
