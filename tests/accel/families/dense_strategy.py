"""A method for tests of video families: all of attention, by the road that methods take instead of the stock one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import attnswap
import torch
import torch.nn.functional as F
from attnswap.accel.families.base import Layout, Place
from attnswap.accel.methods import STRATEGIES
from attnswap.accel.methods.base import Config, Strategy
from torch import Tensor, nn


@dataclass(frozen=True)
class Dense(Config):
    """Plain attention; unless it is active, the stock one."""

    name: ClassVar[str] = "dense"

    active: bool = True


@dataclass
class DensePlan:
    """All pairs."""

    pairs: int
    around: bool = False
    searches: bool = False


@dataclass(frozen=True)
class Seen:
    """What reached the method in one layer of one call.

    Attributes:
        place: of the video tokens, as the family told it.
        shape: of query, key and value, `[B, S, H, D]`.
        key_mask: as given.
    """

    place: Place
    shape: tuple[int, ...]
    key_mask: Tensor | None


class DenseStrategy(Strategy):
    """Plain attention in every layer over video tokens; remembers the last call of each."""

    kinds: ClassVar[frozenset[str]] = frozenset({"video"})

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.seen: dict[str, Seen] = {}

    def select(self, layers: Mapping[str, nn.Module]) -> dict[str, str]:
        return {name: "plain attention" for name in layers if self.family.self_attention(name)}

    def why_not(self, layer: str) -> str:
        return "not attention over video tokens"

    def begin(self, call: Any, layouts: Mapping[str, Layout]) -> None:
        self.seen = {}
        for name in self.layers:
            if layouts[name].grid and self.config.active:
                layouts[name].plan = DensePlan(layouts[name].place.tokens ** 2)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, context: Any, *, key_mask: Tensor | None = None
    ) -> Tensor:
        assert query.shape == key.shape == value.shape
        if not torch.compiler.is_compiling():
            self.seen[layout.layer] = Seen(layout.place, tuple(query.shape), key_mask)
        mask = None if key_mask is None else key_mask[:, None, None]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


@contextmanager
def dense(target: Any, *, active: bool = True) -> Iterator[attnswap.Handle]:
    """`attnswap.enabled` with this method, which is registered for as long."""
    with mock.patch.dict(STRATEGIES, {Dense.name: DenseStrategy}), attnswap.enabled(target, Dense(active)) as handle:
        yield handle


def seen(handle: attnswap.Handle) -> dict[str, Seen]:
    """What the last call of the first denoiser brought, by layer."""
    strategy = handle._installations[0].strategies[0]
    assert isinstance(strategy, DenseStrategy)
    return strategy.seen


def notes(handle: attnswap.Handle) -> list[str]:
    """What the report remarks on."""
    return [note["text"] for note in handle.report().to_dict()["denoisers"][0]["notes"]]
