"""What goes wrong with the published code of CLEAR, one test each, and what happens here instead.

C6, the inputs of its training, is in tests/training/test_distill_clear.py; C9, context parallelism, in
tests/accel/test_context_parallel.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attnswap
import pytest
import torch
from attnswap import Clear
from attnswap.benchmarks.memory import peak_bytes
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from peft import LoraConfig

from . import clear_cases as cases
from .common import largest_difference, notes


@pytest.fixture
def model() -> Any:
    return cases.transformer()


def test_two_sizes_take_turns(model: Any) -> None:
    """C1: of as many tokens each, so that nothing but the rows and columns tells them apart."""
    grids = [(12, 8), (8, 12), (12, 8), (6, 16), (8, 12)]
    with attnswap.enabled(model, Clear(radius=3)):
        for grid in grids:
            out = cases.call(model, grid)
            assert largest_difference(out, cases.by_definition(cases.transformer(), grid, 3)) <= cases.CLOSE


def test_one_processor_serves_every_size_and_keeps_its_weights(model: Any, tmp_path: Path) -> None:
    """C2."""
    weights = cases.write(tmp_path, model, 3, 2)
    with attnswap.enabled(model, Clear(radius=3, down_factor=2, weights=str(tmp_path))):
        processors = dict(model.attn_processors)
        for grid in ((4, 6), (10, 8), (4, 6)):
            wanted = cases.by_definition(cases.transformer(), grid, 3, weights)
            assert largest_difference(cases.call(model, grid), wanted) <= cases.CLOSE
        assert all(model.attn_processors[name] is processor for name, processor in processors.items())


@pytest.mark.parametrize("text", [1, 5, 130])
def test_a_far_field_goes_with_text_of_any_length(text: int, model: Any) -> None:
    """C3."""
    with attnswap.enabled(model, Clear(radius=3, down_factor=2)):
        out = cases.call(model, (6, 8), text=text)
    assert largest_difference(out, cases.by_definition(model, (6, 8), 3, text=text, mean=2)) <= cases.CLOSE


def test_a_grid_that_cells_do_not_divide_is_refused_with_the_numbers(model: Any) -> None:
    """C4."""
    with attnswap.enabled(model, Clear(radius=3, down_factor=4)):
        with pytest.raises(
            ValueError, match=r"down_factor 4 does not divide the grid of 8x6 tokens: .* multiples of 4"
        ):
            cases.call(model, (8, 6))
        cases.call(model, (8, 4))


@pytest.mark.parametrize("down_factor", [None, 2])
def test_tokens_of_a_reference_image_are_seen_by_all(down_factor: int | None, model: Any) -> None:
    """C5: those of Kontext follow the image. They are neither pooled nor do they see what is."""
    with attnswap.enabled(model, Clear(radius=3, down_factor=down_factor)):
        out = cases.call(model, (6, 8), reference=(4, 5))
    wanted = cases.by_definition(model, (6, 8), 3, reference=(4, 5), mean=down_factor)
    assert largest_difference(out, wanted) <= cases.CLOSE


def ip_adapter(model: Any) -> dict[str, Any]:
    """Random weights for the double blocks, one image token of four."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    width, of_image = 32, 32
    layers = {
        f"{i}.{name}": normal(width, of_image) if name.endswith("weight") else normal(width)
        for i in range(len(model.transformer_blocks))
        for name in ("to_k_ip.weight", "to_k_ip.bias", "to_v_ip.weight", "to_v_ip.bias")
    }
    projection = {
        "proj.weight": normal(4 * of_image, 16),
        "proj.bias": normal(4 * of_image),
        "norm.weight": normal(of_image),
        "norm.bias": normal(of_image),
    }
    return {"ip_adapter": layers, "image_proj": projection}


def test_an_ip_adapter_keeps_its_blocks_and_the_report_says_so(model: Any) -> None:
    """C7: the others stay local, and so does every block once it is gone."""
    handle = attnswap.enable(model, Clear(radius=3))
    local = cases.call(model, (6, 8))
    model._load_ip_adapter_weights(ip_adapter(model))
    image: Any = {"ip_adapter_image_embeds": [torch.ones(1, 1, 16)]}
    with pytest.warns(attnswap.AttnswapWarning, match="replaced by FluxIPAdapterAttnProcessor, which holds weights"):
        cases.call(model, (6, 8), joint_attention_kwargs=image)
    layers = handle.report().to_dict()["denoisers"][0]["layers"]
    assert {x["name"]: x["accelerated_calls"] for x in layers} == {
        "transformer_blocks.0.attn": 1,
        "single_transformer_blocks.0.attn": 2,
        "single_transformer_blocks.1.attn": 2,
    }
    assert any("FluxIPAdapterAttnProcessor" in text for text in notes(handle))
    again = attnswap.enable(model, Clear(radius=3))
    [kept] = [x for x in again.report().to_dict()["denoisers"][0]["layers"] if not x["accelerated"]]
    assert kept["reason"] == "FluxIPAdapterAttnProcessor holds weights and is kept"
    # As `FluxPipeline.unload_ip_adapter` does it.
    model.encoder_hid_proj, model.config.encoder_hid_dim_type = None, None
    model.set_attn_processor(
        {
            name: (FluxAttnProcessor if isinstance(processor, FluxIPAdapterAttnProcessor) else type(processor))()
            for name, processor in model.attn_processors.items()
        }
    )
    with attnswap.enabled(model, Clear(radius=3)):
        assert torch.equal(cases.call(model, (6, 8)), local)


def test_weights_come_to_a_model_that_has_a_lora(model: Any, tmp_path: Path) -> None:
    """C8: its keys are others then. What the LoRA adds stays on top."""
    weights = cases.write(tmp_path, model)
    stock = cases.transformer()
    torch.manual_seed(5)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False), "extra")
    for layer, attn in cases.attention(model).items():
        for name in weights[layer]:
            projection = attn.get_submodule(name.rpartition(".")[0])
            if name.endswith("weight"):
                product = projection.lora_B["extra"].weight @ projection.lora_A["extra"].weight
                weights[layer][name] = weights[layer][name] + 1.5 * product.detach()
    with attnswap.enabled(model, Clear(radius=3, weights=str(tmp_path))):
        out = cases.call(model, (6, 8))
    assert largest_difference(out, cases.by_definition(stock, (6, 8), 3, weights)) <= cases.CLOSE


def test_memory_does_not_grow_with_the_square_of_the_tokens(model: Any) -> None:
    """C10: beside a mask or scores of all pairs, of which there would be 9 million."""
    peaks = []
    with attnswap.enabled(model, Clear(radius=3)), attnswap.kernels.use_backend("eager"):
        for grid in ((24, 32), (48, 64)):
            peaks.append(peak_bytes(lambda grid=grid: cases.call(model, grid), torch.device("cpu")))
    assert peaks[1] <= 4.5 * peaks[0]
    assert peaks[1] < (48 * 64) ** 2
