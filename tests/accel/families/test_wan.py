"""What is particular to Wan and the models built on its blocks."""

from __future__ import annotations

from typing import Any

import attnswap
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from .. import tiny_dit
from ..video_models import WAN, Case, layer_inputs, run, skyreels, wan, wan_inputs, wan_vace
from .dense_strategy import dense, notes, seen

MODELS = pytest.mark.parametrize("case", WAN, ids=lambda case: case.name)
GRID, TEXT = (3, 5, 7), 6


def agree(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(actual, wanted, atol=2e-6, rtol=1e-5)


def test_a_layer_called_by_position_or_by_name_gives_what_stock_gives() -> None:
    model = wan()
    attn, (tokens, rope) = model.blocks[0].attn1, layer_inputs(model, GRID)
    with torch.no_grad():
        stock = attn(tokens, None, None, rope)
        assert (attn(tokens) - stock).abs().max() > 1e-4, "positions count"
        with dense(model) as handle:
            run(model, wan_inputs(GRID, TEXT, 2))
            agree(attn(tokens, None, None, rope), stock)
            agree(attn(hidden_states=tokens, rotary_emb=rope), stock)
            agree(attn.processor(attn, tokens, rotary_emb=rope), stock)
            assert notes(handle) == []


@MODELS
def test_fused_projections_take_part(case: Case) -> None:
    model, inputs = case.make(), case.inputs(GRID, TEXT, 2)
    stock = run(model, inputs)
    with dense(model) as handle:
        model.fuse_qkv_projections()
        # What they were made of is not asked any more.
        model.blocks[0].attn1.to_q.weight.data.zero_()
        agree(run(model, inputs), stock)
        assert len(seen(handle)) == case.layers


def test_control_blocks_of_vace_attend_over_the_same_tokens() -> None:
    chosen = {layer.name for layer in attnswap.inspect(wan_vace(), "adaspa").layers if layer.accelerated}
    assert chosen == {f"{blocks}.{number}.attn1" for blocks in ("blocks", "vace_blocks") for number in (0, 1)}


def test_both_transformers_of_wan_22_take_part() -> None:
    pipe, arguments = tiny_dit.wan()

    def sample() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        output: torch.Tensor = pipe(**arguments, num_inference_steps=4, output_type="latent", generator=generator)[0]
        return output

    stock = sample()
    with dense(pipe) as handle:
        torch.testing.assert_close(sample(), stock, atol=1e-5, rtol=1e-5)
        layers = [x for d in handle.report().to_dict()["denoisers"] for x in d["layers"] if x["accelerated"]]
    assert len(layers) == 4
    assert all(layer["accelerated_calls"] and not layer["dense_calls"] for layer in layers)


# What cannot be accelerated runs dense, and the report says why.


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"encoder_hidden_states": torch.ones(2, 4, 24)}, "it was given other tokens to attend to"),
        ({"attention_mask": torch.ones(1, 1, 105, 105, dtype=torch.bool).tril()}, "an attention mask was given"),
        ({"hidden_states": torch.ones(2, 104, 24)}, "104 tokens, not the 105 of the 3x5x7 grid"),
    ],
    ids=["other tokens", "mask", "another number of tokens"],
)
def test_a_call_that_is_not_all_tokens_among_themselves(changes: dict[str, Any], why: str) -> None:
    model = wan()
    attn, arguments = model.blocks[1].attn1, {"hidden_states": layer_inputs(model, GRID)[0], **changes}
    with torch.no_grad():
        stock = attn(**arguments)
        with dense(model):
            run(model, wan_inputs(GRID, TEXT, 2))
            with pytest.warns(attnswap.AttnswapWarning, match=f"blocks.1.attn1 ran dense: {why}"):
                assert torch.equal(attn(**arguments), stock)


def test_frames_in_causal_blocks() -> None:
    model, inputs = skyreels(), wan_inputs((4, 3, 2), TEXT, 1)
    plain = run(model, inputs)
    model._set_ar_attention(2)
    stock = run(model, inputs)
    assert not torch.equal(stock, plain)
    with dense(model) as handle:
        with pytest.warns(attnswap.AttnswapWarning, match="a call ran dense: frames see no later ones"):
            assert torch.equal(run(model, inputs), stock)
        assert len(notes(handle)) == 1
        model._set_ar_attention(1)
        agree(run(model, inputs), plain)


def test_a_processor_that_computes_something_else() -> None:
    class Louder(WanAttnProcessor):
        def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            return 2 * super().__call__(*args, **kwargs)

    model, inputs = wan(), wan_inputs(GRID, TEXT, 1)
    model.blocks[0].attn1.set_processor(Louder())
    stock = run(model, inputs)
    with dense(model) as handle:
        with pytest.warns(attnswap.AttnswapWarning, match="blocks.0.attn1 ran dense: Louder computes its own"):
            agree(run(model, inputs), stock)
        assert list(seen(handle)) == ["blocks.1.attn1"]
