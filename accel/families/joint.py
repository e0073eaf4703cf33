"""What the processors of transformers over text and image tokens share."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack

from .base import Slot
from .parallel import ContextParallel

#: Diffusers' annotations say neither what it takes nor what it returns.
rotate: Any = apply_rotary_emb


class JointProcessor:
    """Base of our processors beside a stock one, which they are without a slot or in a call that has no plan."""

    def __init__(self) -> None:
        super().__init__()
        self.slot: Slot | None = None

    def takes(self, hidden_states: Tensor, tokens: int, why_not: str = "") -> bool:
        """Whether the method's plan fits this call over `tokens` tokens, those of this rank.

        Where it does not, or `why_not` gives another reason, the layer runs dense and the report says why.
        """
        slot = self.slot
        assert slot is not None
        plan, place, batch = slot.layout.plan, slot.layout.place, hidden_states.shape[0]
        parallel = ContextParallel.of(slot.strategy.model)
        expected = place.tokens if parallel is None else parallel.tokens(place)
        if plan is not None and not why_not:
            if not slot.strategy.family.exchangeable(slot.original):
                why_not = f"{type(slot.original).__name__} computes its own attention"
            elif _scores_are_skipped():
                why_not = "a guider takes the values in place of attention"
            elif tokens != expected:
                grid = "x".join(map(str, slot.layout.grid))
                whose = "" if parallel is None else f", split over {parallel.ranks} ranks"
                why_not = f"{tokens} tokens, not the {expected} of the {grid} grid and what is around it{whose}"
        if plan is not None and why_not:
            slot.context.recorder.note(f"{slot.name} ran dense: {why_not}", warn=True)
            plan = None
        if plan is None:
            # All that the ranks hold together.
            slot.count(batch, tokens * (1 if parallel is None else parallel.ranks), None)
        return plan is not None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        """The method's attention `[B, S, H, D]` in a call it takes; `key_mask` is bool `[B, S]`, True for what is seen.

        Under context parallelism S counts the tokens of this rank, and the method sees all of them and a share of the
        heads.
        """
        slot = self.slot
        assert slot is not None
        if torch.is_autocast_enabled(value.device.type):
            # Norms leave fp32 then, and attention is among what autocast computes in the lower precision.
            query, key = query.to(value.dtype), key.to(value.dtype)
        strategy, layout, context = slot.strategy, slot.layout, slot.context
        parallel = ContextParallel.of(strategy.model)
        heads = query.shape[2]
        if parallel is not None:
            key_mask = None if key_mask is None else parallel.gather_mask(layout.place, key_mask)
            query, key, value = parallel.gather(layout.place, query, key, value)
        attended = strategy.attend(query, key, value, layout, context, key_mask=key_mask)
        # Only now: how much is computed may be a finding of this very call. A graph that asked would depend on it.
        if not torch.compiler.is_compiling():
            slot.count(query.shape[0], layout.place.tokens, layout.plan.pairs, searched=layout.plan.searches)
        return attended if parallel is None else parallel.scatter(layout.place, attended, heads)


def _scores_are_skipped() -> bool:
    """Whether perturbed-attention guidance is at work, which intercepts stock attention only."""
    if torch.compiler.is_compiling():
        return False
    return any(isinstance(mode, AttentionScoreSkipFunctionMode) for mode in _get_current_function_mode_stack())


def let_guiders_know(ours: type[Any], stock: type[Any]) -> None:
    """Diffusers' guiders that skip a layer's attention look up by the class of its processor what to return."""
    AttentionProcessorRegistry.register(ours, AttentionProcessorRegistry.get(stock))


def _of_the_original(name: str) -> Any:
    """An attribute that Diffusers sets on processors, and that ours hands to the one it stands for."""

    def read(self: JointProcessor) -> Any:
        return vars(self).get(name) if self.slot is None else getattr(self.slot.original, name, None)

    def write(self: JointProcessor, value: Any) -> None:
        if self.slot is None:
            vars(self)[name] = value
        else:
            setattr(self.slot.original, name, value)

    return property(read, write)


class DispatchingProcessor(JointProcessor):
    """For families whose stock processor lets the user choose a backend (`set_attention_backend`).

    That choice is about dense attention: the original runs it, and keeps it after `disable`.
    """

    _attention_backend = _of_the_original("_attention_backend")
    _parallel_config = _of_the_original("_parallel_config")


def chosen_backend(processor: Any) -> str | None:
    """The attention backend that the user has chosen for a stock processor; None for PyTorch's own choice."""
    if not hasattr(processor, "_attention_backend"):
        return None
    backend = processor._attention_backend
    if backend is None:
        backend, _ = _AttentionBackendRegistry.get_active_backend()
    name = str(getattr(backend, "value", backend))
    return None if name == AttentionBackendName.NATIVE.value else name


class ThetaRope:
    """Rotary positions whose base is an attribute that is read in each call.

    Args:
        module: has `theta`.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._theta = module.theta

    def scale(self, factor: float) -> None:
        self._module.theta = self._theta * factor

    def restore(self) -> None:
        self._module.theta = self._theta


def project(attn: Any, hidden_states: Tensor, *, fused: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value `[B, S, H, D]` of image tokens; calls the modules, so LoRA and offloading take part.

    Families differ in what says that projections are fused: `Attention` keeps fused weights, then stale, when unfused.
    """
    if fused:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    return split_heads(attn, query, key, value)


def project_text(attn: Any, text: Tensor, *, fused: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The same of text tokens, by the projections added for them."""
    if fused:
        query, key, value = attn.to_added_qkv(text).chunk(3, dim=-1)
    else:
        query, key, value = attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)
    return split_heads(attn, query, key, value)


def split_heads(attn: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, S, H * D]` to `[B, S, H, D]`. By the width of a head, since tensor parallelism shares out the heads."""
    heads = (-1, head_dim(attn))
    return query.unflatten(-1, heads), key.unflatten(-1, heads), value.unflatten(-1, heads)


def head_dim(attn: Any) -> int:
    """Width of a head: an attribute of the newer attention classes, the scale of `Attention` tells it otherwise."""
    width: int | None = getattr(attn, "head_dim", None)
    return attn.inner_dim // attn.heads if width is None else width


def normed(norm: Any, x: Tensor) -> Tensor:
    """Through a norm that some models of a family leave out."""
    return x if norm is None else norm(x)
