"""The base of rotary positions can be changed on a stock model, and is as it was afterwards."""

from __future__ import annotations

from typing import Any

import attnswap
import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from diffusers.models.transformers.transformer_z_image import RopeEmbedder

from ..watching import unchanged
from .image_models import CASES, qwen, run

SIZE = ((5, 6), 5, 2)
STRETCHED = attnswap.Clear(radius=None, ntk_factor=10)


def with_base_times_ten(model: Any) -> Any:
    """A stock model of the same weights, made with another base."""
    if hasattr(model, "rope_embedder"):
        own = model.rope_embedder
        model.rope_embedder = RopeEmbedder(own.theta * 10, own.axes_dims, own.axes_lens)
    elif isinstance(model.pos_embed, QwenEmbedRope):
        model.pos_embed = QwenEmbedRope(model.pos_embed.theta * 10, model.pos_embed.axes_dim, scale_rope=True)
    else:
        model.pos_embed.theta *= 10
    return model


def rope_state(model: Any) -> dict[str, Any]:
    return dict(vars(getattr(model, "rope_embedder", None) or model.pos_embed))


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image", "z_image"])
def test_positions_are_those_of_a_model_made_with_that_base(name: str) -> None:
    case = CASES[name]
    model, inputs = case.make(), case.inputs(*SIZE)
    wanted, stock, before = run(with_base_times_ten(case.make()), inputs), run(model, inputs), rope_state(model)
    assert (wanted - stock).abs().max() > 1e-4
    with unchanged(model):
        for _ in range(2):
            with attnswap.enabled(model, STRETCHED):
                torch.testing.assert_close(run(model, inputs), wanted, atol=2e-6, rtol=1e-5)
            assert torch.equal(run(model, inputs), stock)
    after = rope_state(model)
    assert all(after[key] is value for key, value in before.items()), "the very same tables"


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_tables_follow_a_factor_that_changes(name: str) -> None:
    case = CASES[name]
    model, inputs = case.make(), case.inputs(*SIZE)
    handle = attnswap.enable(model, attnswap.Clear(radius=None, ntk_factor=10, ntk_decay=True))
    stretched = []
    handle.set_timesteps(timesteps := torch.tensor([0.9, 0.5, 0.1]))
    for t in timesteps:
        inputs["timestep" if "timestep" in inputs else "t"] = t.expand(2)
        stretched.append(run(model, inputs))
    handle.disable()
    # At the last step the factor has fallen to 1.
    assert torch.equal(run(model, inputs), stretched[-1])
    assert not torch.equal(stretched[0], stretched[1])


def test_a_model_without_rotary_positions_is_refused() -> None:
    case = CASES["sd3"]
    model = case.make()
    with unchanged(model), pytest.raises(attnswap.UnsupportedModel, match="SD3Transformer2DModel: it has no rotary"):
        attnswap.enable(model, STRETCHED)


def test_positions_in_layers_are_refused() -> None:
    model = qwen(use_layer3d_rope=True)
    with unchanged(model), pytest.raises(attnswap.UnsupportedModel, match="QwenEmbedLayer3DRope cannot be changed"):
        attnswap.enable(model, STRETCHED)
