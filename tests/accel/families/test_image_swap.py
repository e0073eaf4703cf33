"""The engine's promises on image transformers: exact ways in and out; every layer that is left alone is reported."""

from __future__ import annotations

import copy
from typing import Any

import attnswap
import pytest
import torch
from diffusers.hooks import HookRegistry, LayerSkipConfig, apply_layer_skip
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

from .. import tiny_dit
from ..slim import slim
from ..watching import unchanged
from .image_models import CASES, Case, flux, noise, run

FAMILIES = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
GRID, TEXT = (5, 6), 5
LOCAL = attnswap.Clear(radius=2)


def notes(handle: attnswap.Handle) -> list[str]:
    return [note["text"] for note in handle.report().to_dict()["denoisers"][0]["notes"]]


@FAMILIES
def test_in_and_out_again_bit_for_bit(case: Case) -> None:
    model, inputs = case.make(), case.inputs(GRID, TEXT, 2)
    stock = run(model, inputs)
    with unchanged(model):
        handle = attnswap.enable(model, LOCAL)
        local = run(model, inputs)
        assert not torch.equal(local, stock)
        assert not notes(handle)
        # Again, over itself.
        handle = attnswap.enable(model, LOCAL)
        assert torch.equal(run(model, inputs), local)
        kept = [slot.processor for slot in model._attnswap.slots.values()]
        handle.disable()
    assert torch.equal(run(model, inputs), stock)
    # Whoever kept our processors has stock attention.
    for processor, module in zip(kept, (slot.module for slot in handle._installations[0].slots.values()), strict=True):
        module.processor = processor
    assert torch.equal(run(model, inputs), stock)


@FAMILIES
def test_every_layer_over_image_tokens_is_chosen_and_no_other(case: Case) -> None:
    model = case.make()
    with unchanged(model):
        layers = attnswap.inspect(model, LOCAL).layers
    chosen = {layer.name.split(".")[0] for layer in layers if layer.accelerated}
    left = {layer.name.split(".")[0] for layer in layers if not layer.accelerated}
    assert left == ({"context_refiner"} if case.name == "z_image" else set())
    assert (
        chosen
        == {name.split(".")[0] for name, _ in model.named_modules() if name.endswith((".attn", ".attention"))} - left
    )


@FAMILIES
def test_processors_are_those_of_the_stock_class_and_made_anew_without_arguments(case: Case) -> None:
    model, inputs = case.make(), case.inputs(GRID, TEXT, 1)
    with attnswap.enabled(model, LOCAL) as handle:
        local = run(model, inputs)
        for slot in model._attnswap.slots.values():
            assert isinstance(slot.processor, type(slot.original))
            slot.module.processor = type(slot.processor)()
        assert torch.equal(run(model, inputs), local)
        assert notes(handle) == ["a processor was re-created and armed again"]


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen_image", "z_image"])
def test_a_backend_chosen_while_enabled_is_that_of_dense_attention_and_stays(name: str) -> None:
    case = CASES[name]
    model, inputs = case.make(), case.inputs(GRID, TEXT, 1)
    originals = [slot.processor for slot in attention(model)]
    with attnswap.enabled(model, LOCAL):
        local = run(model, inputs)
        model.set_attention_backend("_native_math")
        assert {p._attention_backend.value for p in originals} == {"_native_math"}
        assert {slot.processor._attention_backend.value for slot in attention(model)} == {"_native_math"}
        torch.testing.assert_close(run(model, inputs), local, atol=1e-6, rtol=1e-5)
    assert [slot.processor for slot in attention(model)] == originals
    assert {p._attention_backend.value for p in originals} == {"_native_math"}
    model.reset_attention_backend()


@pytest.fixture(autouse=True)
def native_backend() -> Any:
    """Diffusers' choice of a backend outlives the model it was made on."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    before = registry._active_backend
    yield
    registry._active_backend = before


def attention(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "processor")]


@FAMILIES
@pytest.mark.parametrize("method", ["hidiffusion", "linfusion"])
def test_a_method_for_other_models_is_refused_in_one_line(case: Case, method: str) -> None:
    model = case.make()
    wanted = (
        rf"{method} does not work on {type(model).__name__}, which takes adaspa, clear; {method} works on UNet2D\w+$"
    )
    with unchanged(model), pytest.raises(attnswap.UnsupportedModel, match=wanted) as refused:
        attnswap.enable(model, method)
    assert "\n" not in str(refused.value)


def test_clear_is_refused_on_a_unet() -> None:
    unet = slim("sd15").unet
    with unchanged(unet), pytest.raises(attnswap.UnsupportedModel, match="clear works on SD3Transformer2DModel, Flux"):
        attnswap.enable(unet, "clear")


# What cannot be accelerated runs dense, and the report says why.


def dense_because(case: Case, inputs: dict[str, Any], why: str) -> None:
    model = case.make()
    stock = run(model, inputs)
    handle = attnswap.enable(model, LOCAL)
    with pytest.warns(attnswap.AttnswapWarning, match=why):
        assert torch.equal(run(model, inputs), stock)
    assert handle.report().density == 1.0


def test_ids_that_form_no_grid() -> None:
    for name in ("flux", "flux2"):
        inputs = CASES[name].inputs(GRID, TEXT, 1)
        inputs["img_ids"] = torch.zeros_like(inputs["img_ids"])
        dense_because(CASES[name], inputs, "a call ran dense: the 30 img_ids are not the rows of a grid")


def test_pictures_of_one_batch_in_different_sizes() -> None:
    inputs = CASES["z_image"].inputs((4, 4), TEXT, 2)
    inputs["x"][1] = noise(4, 1, 4, 16)
    model = CASES["z_image"].make()
    with torch.no_grad():
        stock = model(**inputs, return_dict=False)[0]
        attnswap.enable(model, LOCAL)
        with pytest.warns(attnswap.AttnswapWarning, match="the pictures of the batch differ in shape"):
            output = model(**inputs, return_dict=False)[0]
    assert all(torch.equal(*pair) for pair in zip(output, stock, strict=True))

    inputs = CASES["qwen_image"].inputs(GRID, TEXT, 2)
    inputs["img_shapes"][1:] = [[(1, 3, 10)]]
    dense_because(CASES["qwen_image"], inputs, "the pictures of the batch differ in shape")


def test_several_frames() -> None:
    inputs = CASES["z_image"].inputs((4, 4), TEXT, 1)
    inputs["x"] = [noise(4, 2, 8, 8)]
    dense_because(CASES["z_image"], inputs, "2 frames are not one grid")
    inputs = CASES["qwen_image"].inputs((4, 4), TEXT, 1)
    inputs["img_shapes"] = [[(2, 4, 2)]]
    dense_because(CASES["qwen_image"], inputs, "2 frames are not one grid")


def test_a_picture_in_layers() -> None:
    case = CASES["qwen_image"]
    inputs = case.inputs((4, 4), TEXT, 1, (4, 4))
    layered = Case("layered", lambda: case.make(use_layer3d_rope=True), case.inputs, case.sequences)
    dense_because(layered, inputs, "a picture in layers is not one grid")


def test_an_attention_mask_in_flux() -> None:
    inputs = CASES["flux"].inputs(GRID, TEXT, 1)
    inputs["joint_attention_kwargs"] = {"attention_mask": torch.zeros(1, 1, 35, 35)}
    dense_because(CASES["flux"], inputs, "transformer_blocks.0.attn ran dense: an attention mask was given")


def test_another_number_of_tokens_than_expected() -> None:
    model, inputs = CASES["sd35"].make(), CASES["sd35"].inputs(GRID, TEXT, 1)
    layer, merged = model.transformer_blocks[0].attn2, noise(1, 7, 32)
    with torch.no_grad():
        stock = layer(merged)
        handle = attnswap.enable(model, LOCAL)
        run(model, inputs)
        with pytest.warns(attnswap.AttnswapWarning, match="7 tokens, not the 30 of the 5x6 grid"):
            assert torch.equal(layer(merged), stock)
    assert handle.report().density < 1


def test_flux2_with_a_cache_of_reference_images_keeps_its_processors() -> None:
    case = CASES["flux2"]
    model = case.make()
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    # As its pipeline does: the reference comes first in the step that fills the cache.
    inputs = case.inputs(GRID, TEXT, 1, (3, 3))
    first = {**inputs, "kv_cache_mode": "extract", "num_ref_tokens": 9}
    later = {**case.inputs(GRID, TEXT, 1), "kv_cache_mode": "cached"}

    def both() -> list[torch.Tensor]:
        with torch.no_grad():
            sample, cache = model(**first, return_dict=False)
            return [sample, model(**later, kv_cache=cache, return_dict=False)[0]]

    stock = both()
    with unchanged(model), attnswap.enabled(model, LOCAL) as handle:
        with pytest.warns(attnswap.AttnswapWarning, match="ran dense: Flux2KV"):
            assert all(torch.equal(*pair) for pair in zip(both(), stock, strict=True))
        assert not any(layer.accelerated for layer in attnswap.inspect(model, LOCAL).layers)
        assert "Flux2KVAttnProcessor computes its own attention and is kept" in str(handle.report())


def ip_adapter(model: Any) -> dict[str, Any]:
    """Weights of a small IP-Adapter in the published layout."""
    width, text = model.inner_dim, model.config.joint_attention_dim
    layers = {
        f"{index}.{name}.{kind}": noise(*((width, text) if kind == "weight" else (width,)))
        for index in range(len(model.transformer_blocks))
        for name in ("to_k_ip", "to_v_ip")
        for kind in ("weight", "bias")
    }
    projection = {
        "proj.weight": noise(4 * text, 6),
        "proj.bias": noise(4 * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    return {"ip_adapter": layers, "image_proj": projection}


@pytest.mark.parametrize("order", ["adapter first", "method first"])
def test_layers_with_an_ip_adapter_are_kept_and_the_others_local(order: str) -> None:
    model, inputs = flux(), CASES["flux"].inputs(GRID, TEXT, 1)
    inputs["joint_attention_kwargs"] = {"ip_adapter_image_embeds": [noise(1, 1, 6)]}
    if order == "adapter first":
        model._load_ip_adapter_weights([ip_adapter(model)], low_cpu_mem_usage=False)
        handle = attnswap.enable(model, LOCAL)
    else:
        handle = attnswap.enable(model, LOCAL)
        model._load_ip_adapter_weights([ip_adapter(model)], low_cpu_mem_usage=False)
    if order == "adapter first":
        run(model, copy.deepcopy(inputs))
    else:
        with pytest.warns(
            attnswap.AttnswapWarning, match="replaced by FluxIPAdapterAttnProcessor, which holds weights"
        ):
            run(model, copy.deepcopy(inputs))
    report = handle.report().to_dict()["denoisers"][0]["layers"]
    assert {layer["name"].split(".")[0] for layer in report if layer["accelerated_calls"]} == {
        "single_transformer_blocks"
    }
    handle.disable()
    assert all(type(b.attn.processor) is FluxAttnProcessor for b in model.single_transformer_blocks)
    run(model, copy.deepcopy(inputs))


# The stock FLUX and, where all of attention is skipped, Qwen-Image fail.
@pytest.mark.parametrize(
    ("name", "skipped"),
    [("qwen_image", "skip_attention_scores"), ("z_image", "skip_attention_scores"), ("z_image", "skip_attention")],
)
def test_layers_whose_attention_a_guider_skips_are_skipped(name: str, skipped: str) -> None:
    case = CASES[name]
    model, inputs = case.make(), case.inputs(GRID, TEXT, 1)
    blocks = "layers" if name == "z_image" else "transformer_blocks"
    how = {"skip_attention": False, "skip_attention_scores": False, "skip_ff": False, skipped: True}
    skip = LayerSkipConfig(indices=[0, 1], fqn=blocks, **how)

    def perturbed() -> torch.Tensor:
        apply_layer_skip(model, skip)
        output = run(model, inputs)
        HookRegistry.check_if_exists_or_initialize(model).remove_hook("layer_skip_hook", recurse=True)
        return output

    plain, stock = run(model, inputs), perturbed()
    assert not torch.equal(plain, stock)
    with attnswap.enabled(model, attnswap.Clear(radius=20)):
        if skipped == "skip_attention":
            torch.testing.assert_close(perturbed(), stock, atol=2e-6, rtol=1e-5)
        else:
            with pytest.warns(attnswap.AttnswapWarning, match="a guider takes the values in place of attention"):
                torch.testing.assert_close(perturbed(), stock, atol=2e-6, rtol=1e-5)
    assert torch.equal(run(model, inputs), plain)


def test_a_copy_of_an_enabled_model_is_enabled_and_its_own() -> None:
    case = CASES["flux"]
    model, inputs = case.make(), case.inputs(GRID, TEXT, 1)
    stock = run(model, inputs)
    attnswap.enable(model, LOCAL)
    local, twin = run(model, inputs), copy.deepcopy(model)
    attnswap.disable(model)
    assert torch.equal(run(twin, inputs), local)
    attnswap.disable(twin)
    assert torch.equal(run(twin, inputs), stock)


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_a_copy_keeps_its_stretched_positions_when_the_original_is_disabled(name: str) -> None:
    case = CASES[name]
    model, inputs = case.make(), case.inputs(GRID, TEXT, 1)
    handle = attnswap.enable(model, attnswap.Clear(radius=2, ntk_factor=4.0))
    stretched, twin = run(model, inputs), copy.deepcopy(model)
    handle.disable()
    assert not torch.equal(run(model, inputs), stretched)
    assert torch.equal(run(twin, inputs), stretched)


def test_z_image_has_no_setter_of_its_own_and_is_handed_its_processors_all_the_same() -> None:
    case = CASES["z_image"]
    model, inputs = case.make(), case.inputs(GRID, TEXT, 1)
    stock = run(model, inputs)
    with attnswap.enabled(model, LOCAL):
        local = run(model, inputs)
    with unchanged(model):
        processors = attnswap.attn_processors(model, LOCAL)
        assert torch.equal(run(model, inputs), stock), "idle until they are set"
        for name, processor in processors.items():
            model.get_submodule(name.removesuffix(".processor")).set_processor(processor)
        assert torch.equal(run(model, inputs), local)
        attnswap.disable(model)


# Through pipelines, which hold all of them.


@pytest.mark.parametrize("name", sorted(tiny_dit.IMAGES))
def test_pipelines_run_with_the_model_offloaded_in_either_order(name: str) -> None:
    pipe, arguments = tiny_dit.IMAGES[name]()

    def sample() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        output: torch.Tensor = pipe(**arguments, num_inference_steps=2, output_type="latent", generator=generator)[0]
        return output

    stock = sample()
    handle = attnswap.enable(pipe, LOCAL)
    local = sample()
    assert not torch.equal(local, stock)
    assert not notes(handle)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(sample(), local)
    handle.disable()
    assert torch.equal(sample(), stock)
    handle = attnswap.enable(pipe, LOCAL)
    assert torch.equal(sample(), local)
    handle.disable()
    assert torch.equal(sample(), stock)
