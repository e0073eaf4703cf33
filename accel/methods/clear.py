"""CLEAR: each image token attends to all text and to the image tokens inside a circle around it (arXiv 2412.16112)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import kernels
from ...kernels.local_attention import ideal_pairs
from ..context import Context
from ..errors import UnsupportedModel, WeightsError
from ..families.base import Family, Layout, Rope
from ..observe import Call
from . import clear_weights as weights_files
from .base import Config, Strategy
from .clear_layer import CHILD, ClearLayer
from .replacement import renew_group_offloading

# The published high-resolution route: text and image tokens of FLUX at 1024 x 1024 pixels, which it was trained on.
_TRAINED_TOKENS = 64**2 + 512
# And the factor its pooled variant counts tokens with.
_POOLED_TOKENS = 10


@dataclass(frozen=True)
class Clear(Config):
    """Circular local attention in image transformers (FLUX, SD3, Qwen-Image, Z-Image): less work for large pictures.

    Without `weights` the model's own are used, untrained for it: the smaller the radius, the more a picture repeats
    itself.

    Attributes:
        radius: an image token sees those with dy² + dx² < radius², in tokens (16 pixels each in FLUX); None sees all,
            which leaves the settings for high resolution.
        down_factor: also see the whole picture, averaged over cells of so many tokens a side (pooled far field); the
            grid must be divisible by it. Still quadratic in the number of tokens, divided by the square of this.
        weights: a bundled name, a file or folder in the published layout, or a Hub id such as "Huage001/CLEAR", where
            radius and down_factor name the file; None the model's own. They replace projections of the model, adapters
            (LoRA) add to them what they add to its own.
        ntk_factor: multiplies the base of the rotary positions: above 1 for pictures larger than the model was
            trained for (the published route to 4096 pixels takes 10).
        ntk_decay: let that factor fall to 1 over the run, quickly at first, so that positions are stretched while the
            picture is laid out and are the model's own while details are drawn (as DyPE does, arXiv 2510.20766).
        proportional_attention: scale logits with the square root of the logarithm of the number of tokens over that of
            4608, those of FLUX at 1024 x 1024 pixels: sharper above, flatter below, so of no use to small models.

    Raises:
        ValueError: for a value no model could use.
    """

    name: ClassVar[str] = "clear"
    grid_setting: ClassVar[str] = "down_factor"
    files: ClassVar[frozenset[str]] = frozenset({"weights"})
    for_large: ClassVar[Mapping[str, Any]] = {"ntk_factor": 1.0, "ntk_decay": False, "proportional_attention": False}

    radius: float | None = 16
    down_factor: int | None = None
    weights: str | None = None
    ntk_factor: float = 1.0
    ntk_decay: bool = False
    proportional_attention: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.weights, os.PathLike):
            object.__setattr__(self, "weights", os.fspath(self.weights))
        if self.radius is not None and not (_is_number(self.radius) and 1 <= self.radius < math.inf):
            raise ValueError(f"radius must be a number of tokens, at least 1, or None, got {self.radius!r}")
        if self.down_factor is not None and not (_is_whole(self.down_factor) and self.down_factor >= 2):
            raise ValueError(f"down_factor must be a whole number of tokens, at least 2, got {self.down_factor!r}")
        if self.weights is not None and (not isinstance(self.weights, str) or not self.weights):
            raise ValueError(f"weights must be a name, a path, a Hub id or None, got {self.weights!r}")
        for name in ("down_factor", "weights"):
            if self.radius is None and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} {getattr(self, name)} needs a radius, as without one every token is seen: give one, or "
                    f"{name} None"
                )
        if not _is_number(self.ntk_factor) or not 0 < self.ntk_factor < math.inf:
            raise ValueError(f"ntk_factor must be a positive number, got {self.ntk_factor!r}")
        for name in ("ntk_decay", "proportional_attention"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.ntk_decay and self.ntk_factor == 1:
            raise ValueError("ntk_decay needs an ntk_factor other than 1 to let decay")

    @property
    def for_native_size(self) -> bool:
        """As published: there a circle saves next to nothing, and what is composed in sight of all is better."""
        return False


@dataclass
class LocalPlan:
    """Attention of a layer in one call.

    Attributes:
        pairs: query-key pairs an image that are in sight.
        sharpness: factor on the logits beside 1 / sqrt(D).
        pooling: weights `[s, s]` of a cell's tokens; None for their mean.
    """

    pairs: int
    sharpness: float = 1.0
    pooling: Tensor | None = None
    around: bool = False
    searches: bool = False


class ClearStrategy(Strategy):
    """CLEAR at work on one transformer."""

    config: Clear
    kinds: ClassVar[frozenset[str]] = frozenset({"image"})

    def __init__(self, config: Clear, model: nn.Module, family: Family, context: Context, pipeline: Any = None) -> None:
        super().__init__(config, model, family, context, pipeline)
        self.attention: dict[str, Any] = {}
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._rope: Rope | None = None
        #: False: every layer runs as stock, bit for bit, as the teacher of a distillation does.
        self.active = True

    def select(self, layers: Mapping[str, nn.Module]) -> dict[str, str]:
        self.attention = {name: attn for name, attn in layers.items() if self.family.self_attention(name)}
        if not self.attention:
            raise UnsupportedModel(f"{type(self.model).__name__} has no attention over image tokens for clear")
        if self.config.ntk_factor != 1 and self.family.rope is None:
            raise UnsupportedModel(
                f"ntk_factor {self.config.ntk_factor:g} cannot act on {type(self.model).__name__}: "
                "it has no rotary positions"
            )
        given = self.config.weights
        self.context.recorder.remarks["weights"] = (
            "training-free: the model's own weights" if given is None else f"weights: {given}"
        )
        return dict.fromkeys(self.attention, self._in_words())

    def why_not(self, layer: str) -> str:
        return "not attention over image tokens"

    def prepare(self) -> None:
        weights, radius = self.config.weights, self.config.radius
        if weights is None:
            return
        assert radius is not None  # the configuration saw to it
        self._refuse_split_weights()
        expected = weights_files.shapes_by_layer(self.attention, self.config.down_factor)  # before anything is fetched
        file = weights_files.locate(weights, radius, self.config.down_factor)
        self._tensors = weights_files.read(file, expected, type(self.model).__name__)
        trained = weights_files.trained_radius(file)
        if trained not in (None, radius):
            self.context.recorder.note(
                f"{file} was trained for radius {trained:g} and is used with {radius:g}", warn=True
            )

    def install(self, *, passive: bool) -> None:
        if self.config.ntk_factor != 1 and not passive:
            # Only now: while this was planned, another installation may still have changed the positions.
            assert self.family.rope is not None
            self._rope = self.family.rope(self.model)
        if not self._tensors:
            return
        dtype: Any = self.model.dtype
        for name in self.layers:
            layer = ClearLayer.beside(self.attention[name], self._tensors[name], dtype)
            self.attention[name].add_module(CHILD, layer)
        self._tensors = {}
        renew_group_offloading(self.model)

    def remove(self) -> None:
        removed = [attn._modules.pop(CHILD, None) for attn in self.attention.values()]
        if any(layer is not None for layer in removed):
            renew_group_offloading(self.model)
        if self._rope is not None:
            self._rope.restore()

    def beyond_attention(self) -> str:
        return "ntk_factor" if self.config.ntk_factor != 1 else ""

    # Each call.

    def begin(self, call: Call, layouts: Mapping[str, Layout]) -> None:
        if self._rope is not None:
            self._rope.scale(self._ntk_factor() if self.active else 1.0)
        if not self.active:
            return
        if self.config.weights is not None:
            self._refuse_split_weights()
        if self.config.radius is None and not self.config.proportional_attention:
            return
        for name in self.layers:
            layout = layouts[name]
            if layout.grid:
                self._check_divisible(layout.grid)
                # Looked up here: by a layer's name, it would be a graph for each layer of a compiled model.
                ours: ClearLayer | None = getattr(self.attention[name], CHILD, None)
                pooling = None if ours is None else ours.pooling
                layout.plan = LocalPlan(self._pairs(layout), self._sharpness(layout.place.tokens), pooling)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: Layout,
        context: Context,
        *,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        plan: LocalPlan = layout.plan
        scale = plan.sharpness * query.shape[-1] ** -0.5
        if self.config.radius is None:
            return self._attend_to_all(query, key, value, layout, key_mask, scale)
        where: dict[str, Any] = {"grid": layout.grid, "grid_offset": layout.place.start}
        pooled: dict[str, Tensor] = {}
        if self.config.down_factor is not None:
            weights = self._cell_weights(plan, query)
            pooled = {
                "pooled_key": kernels.pool_tokens(key, weights, **where),
                "pooled_value": kernels.pool_tokens(value, weights, **where),
            }
        rest: dict[str, Any] = {**where, **pooled, "radius": self.config.radius, "key_mask": key_mask, "scale": scale}
        if not torch.compiler.is_compiling():
            backend = kernels.explain("local_attention", query, key, value, **rest).backend
            context.recorder.ran_on(layout.layer, backend)
        return kernels.local_attention(query, key, value, **rest)

    def project(
        self, attn: nn.Module, hidden_states: Tensor, stock: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        layer: ClearLayer | None = getattr(attn, CHILD, None)
        return stock(hidden_states) if layer is None else layer.project(attn, hidden_states)

    def output(self, attn: nn.Module, attended: Tensor, stock: Callable[[Tensor], Tensor]) -> Tensor:
        layer: ClearLayer | None = getattr(attn, CHILD, None)
        return stock(attended) if layer is None else layer.output(attn, attended)

    def _attend_to_all(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, key_mask: Tensor | None, scale: float
    ) -> Tensor:
        if not torch.compiler.is_compiling():
            self.context.recorder.ran_on(layout.layer, "torch scaled_dot_product_attention")
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mask = None if key_mask is None else key_mask[:, None, None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)

    def _cell_weights(self, plan: LocalPlan, like: Tensor) -> Tensor:
        """Those of the checkpoint, else of a mean."""
        if plan.pooling is not None:
            return plan.pooling.to(like.device)
        side = self.config.down_factor
        assert side is not None
        return like.new_full((side, side), side**-2, dtype=torch.float32)

    def _sharpness(self, tokens: int) -> float:
        """As published: the pooled keys are not counted among the tokens, but all others count tenfold with them."""
        if not self.config.proportional_attention:
            return 1.0
        if self.config.down_factor is not None:
            tokens *= _POOLED_TOKENS
        return math.sqrt(math.log(tokens) / math.log(_TRAINED_TOKENS))

    def _ntk_factor(self) -> float:
        factor, clock = self.config.ntk_factor, self.context.clock
        if not self.config.ntk_decay:
            return factor
        if clock.position is None or clock.total is None:
            self.context.recorder.note("the number of steps is unknown, so ntk_factor does not decay", warn=True)
            return factor
        left = 1 - clock.position / max(1, clock.total - 1)
        return float(factor ** (left * left))

    def _pairs(self, layout: Layout) -> int:
        place, config = layout.place, self.config
        if config.radius is None:
            return place.tokens**2
        pooled = 0 if config.down_factor is None else math.prod(layout.grid) // config.down_factor**2
        return ideal_pairs((layout.grid[0], layout.grid[1]), config.radius, dense=place.around, pooled=pooled)

    def _check_divisible(self, grid: tuple[int, ...]) -> None:
        side = self.config.down_factor
        if side is not None and any(length % side for length in grid):
            raise ValueError(
                f"down_factor {side} does not divide the grid of {'x'.join(map(str, grid))} tokens: choose a picture "
                f"whose sides are multiples of {side} tokens"
            )

    def _refuse_split_weights(self) -> None:
        """Tensor parallelism gives each rank some of the rows of a projection, and a checkpoint has all of them."""
        parallel = getattr(self.model, "_parallel_config", None)
        if getattr(parallel, "tensor_parallel_config", None) is not None:
            raise WeightsError(
                f"weights {self.config.weights} cannot replace projections that tensor parallelism has split over "
                "devices: use clear without weights, or the model without tensor parallelism"
            )

    def _in_words(self) -> str:
        radius, side = self.config.radius, self.config.down_factor
        if radius is None:
            return "attention to every token"
        return f"local attention of radius {radius:g}" + ("" if side is None else f" and {side}x{side} cells pooled")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
