"""LinFusion: global linear attention in place of softmax self-attention (arXiv 2409.02097)."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ... import kernels
from ..context import Context
from ..errors import UnsupportedModel, WeightsError
from ..families.base import Family, Layout
from ..observe import Call
from . import linfusion_weights as weights_files
from .base import Config, Strategy
from .linfusion_layer import CHILD, LinFusionLayer, from_stock
from .replacement import renew_group_offloading

AUTO = "auto"
# Reported with the published code, whose linear attention overflows in fp16; whether more does is not known.
_FP16_UNSTABLE = "Yuanshi/LinFusion-2-1"


@dataclass(frozen=True)
class LinFusion(Config):
    """Linear self-attention in an SD 1.5, SD 2.1 or SDXL U-Net, by distilled weights: less work for large pictures.

    The weights replace the projections of these layers. Adapters in use or fused (LoRA) add to them what they add to
    the U-Net's own; an adapter that was fused and unloaded is part of those, and so, like any fine-tuning of these
    projections, replaced with them. The report's density counts a linear layer as attention of every token to as
    many keys as a head is wide, which costs the same.

    Attributes:
        weights: a bundled name, a file or folder in the published layout, or a Hub id; "auto" takes what fits the
            layers of the U-Net; None the U-Net's own projections, where distillation starts (poor pictures).
        eps: added to the denominator, which is a mean over the keys.

    Raises:
        ValueError: for a value no U-Net could use.
    """

    name: ClassVar[str] = "linfusion"
    files: ClassVar[frozenset[str]] = frozenset({"weights"})

    weights: Literal["auto"] | str | None = "auto"
    eps: float = 1e-4

    def __post_init__(self) -> None:
        if isinstance(self.weights, os.PathLike):
            object.__setattr__(self, "weights", os.fspath(self.weights))
        if self.weights is not None and (not isinstance(self.weights, str) or not self.weights):
            raise ValueError(f'weights must be "auto", a name, a path, a Hub id or None, got {self.weights!r}')
        is_number = isinstance(self.eps, numbers.Real) and not isinstance(self.eps, bool)
        if not is_number or not torch.finfo(torch.float32).tiny <= self.eps < math.inf:
            raise ValueError(f"eps must be a positive number that float32 can hold, got {self.eps!r}")


@dataclass
class LinearPlan:
    """Linear attention in a layer, in one call: its cost is that of `pairs` query-key pairs an image."""

    pairs: int
    around: bool = False
    searches: bool = False


class LinFusionStrategy(Strategy):
    """LinFusion at work on one U-Net."""

    config: LinFusion
    kinds: ClassVar[frozenset[str]] = frozenset({"unet"})

    def __init__(
        self, config: LinFusion, model: nn.Module, family: Family, context: Context, pipeline: Any = None
    ) -> None:
        super().__init__(config, model, family, context, pipeline)
        self.attention: dict[str, Any] = {}
        self.shapes: list[weights_files.LayerShape] = []
        self._tensors: list[dict[str, Tensor]] = []
        #: False: every layer runs as stock, bit for bit, as the teacher of a distillation does.
        self.active = True

    # What is accelerated, and with which weights.

    def select(self, layers: Mapping[str, nn.Module]) -> dict[str, str]:
        self.attention = {
            name: attn
            for name, attn in layers.items()
            if self.family.self_attention(name) and not getattr(attn, "is_cross_attention", False)
        }
        if not self.attention:
            raise UnsupportedModel(f"{type(self.model).__name__} has no self-attention layer (attn1) for linfusion")
        self.shapes = weights_files.layers_of(self.attention)
        self.source = self.config.weights
        if self.source == AUTO:
            self.source = weights_files.automatic(self.shapes)
        self.context.recorder.remarks["weights"] = f"weights: {self._weights_in_words()}"
        return dict.fromkeys(self.attention, "global linear attention")

    def why_not(self, layer: str) -> str:
        return "not self-attention over image tokens"

    def prepare(self) -> None:
        if self.config.weights is None:
            with torch.random.fork_rng(devices=[]):  # what starts at random here is multiplied by zero
                self._tensors = [from_stock(attn) for attn in self.attention.values()]
            return
        if self.source is None:
            raise WeightsError(
                f"no LinFusion weights are known for a U-Net with {weights_files.signature(self.shapes)}: "
                "distil some (attnswap distill linfusion) and give their folder as weights"
            )
        self._tensors = weights_files.load(self.source, self.shapes, type(self.model).__name__)
        if weights_files.lacks_config(self.source):
            self.context.recorder.note(
                f"{self.source} has no config beside it: its shapes fit, the number of heads could not be checked",
                warn=True,
            )

    def install(self, *, passive: bool) -> None:
        dtype: Any = self.model.dtype
        for attn, tensors in zip(self.attention.values(), self._tensors, strict=True):
            attn.add_module(CHILD, LinFusionLayer.beside(attn, tensors, dtype))
        self._tensors = []
        renew_group_offloading(self.model)
        if self.source == _FP16_UNSTABLE and dtype == torch.float16:
            self.context.recorder.note(f"{_FP16_UNSTABLE} is reported unstable in float16: use bfloat16", warn=True)
        if self.config.weights is None:
            self.context.recorder.note("no distilled weights: the pictures will be poor", warn=True)

    def remove(self) -> None:
        for attn in self.attention.values():
            attn._modules.pop(CHILD, None)
        renew_group_offloading(self.model)

    # Each call.

    def begin(self, call: Call, layouts: Mapping[str, Layout]) -> None:
        if not self.active:
            return
        for name in self.layers:
            layout, attn = layouts[name], self.attention[name]
            if not layout.grid:
                self.context.recorder.note(f"{name} ran dense: its place in the U-Net tells no grid", warn=True)
                continue
            # phi(K)^T V and phi(Q) S cost as much a token as the scores and the sum of d keys.
            layout.plan = LinearPlan(math.prod(layout.grid) * (attn.to_v.out_features // attn.heads))

    def project(
        self, attn: nn.Module, hidden_states: Tensor, stock: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        layer: LinFusionLayer = getattr(attn, CHILD)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in layer.project(attn, hidden_states))
        return query, key, value

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
        if not torch.compiler.is_compiling():
            context.recorder.ran_on(layout.layer, kernels.explain("linear_attention", query, key, value).backend)
        return kernels.linear_attention(query, key, value, eps=self.config.eps)

    def output(self, attn: nn.Module, attended: Tensor, stock: Callable[[Tensor], Tensor]) -> Tensor:
        layer: LinFusionLayer = getattr(attn, CHILD)
        return layer.output(attn, attended)

    def _weights_in_words(self) -> str:
        if self.config.weights is None:
            return "the U-Net's own projections, not distilled: the pictures will be poor"
        if self.source is None:
            return "none known for these layers"
        return self.source if self.config.weights != AUTO else f"{self.source} (auto)"
