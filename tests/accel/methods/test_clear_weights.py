"""CLEAR checkpoints: the published layout, where they are found, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attnswap
import pytest
import torch
from attnswap import Clear
from attnswap.accel.methods import clear_weights as weights_files
from attnswap.accel.methods.clear_layer import ClearLayer
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from .. import tiny_dit
from ..families import image_models
from ..watching import unchanged
from . import clear_cases as cases
from .common import notes


@pytest.fixture
def model() -> Any:
    return cases.transformer()


def refused(model: nn.Module, config: Clear) -> str:
    """The error's one line; checks that nothing has changed, and that what was enabled before still is."""
    before = attnswap.enable(model, Clear(radius=2))
    for road in (attnswap.enable, attnswap.attn_processors):
        with unchanged(model), pytest.raises(attnswap.WeightsError) as caught:
            road(model, config)
        assert before.active
    before.disable()
    message = str(caught.value)
    assert "\n" not in message
    return message


# The layout.


def flux_dev() -> FluxTransformer2DModel:
    """FLUX.1-dev without any weights."""
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True)


def published(down_factor: int | None) -> dict[str, tuple[int, ...]]:
    """The tensors of the released files, in their order, by what the released training saves."""
    found: dict[str, tuple[int, ...]] = {}
    for stem, count, projections in (
        ("transformer_blocks", 19, ("to_q", "to_k", "to_v", "to_out.0")),
        ("single_transformer_blocks", 38, ("to_q", "to_k", "to_v")),
    ):
        for i in range(count):
            for projection in projections:
                found[f"{stem}.{i}.attn.{projection}.weight"] = (3072, 3072)
                found[f"{stem}.{i}.attn.{projection}.bias"] = (3072,)
            if down_factor is not None:
                found[f"{stem}.{i}.attn.processor.spatial_weight"] = (1, 1, 1, down_factor, 1, down_factor, 1)
    return found


@pytest.mark.parametrize("down_factor", [None, 4])
def test_the_layout_is_the_published_one(down_factor: int | None) -> None:
    model, wanted = flux_dev(), published(down_factor)
    local = {key: shape for key, shape in wanted.items() if "spatial_weight" not in key}
    assert len(local) == 380
    assert sum(torch.Size(shape).numel() for shape in local.values()) == 1_793_648_640
    assert len(wanted) == (380 if down_factor is None else 437)
    found = weights_files.shapes_by_layer(cases.attention(model), down_factor)
    flat = [(f"{layer}.{name}", shape) for layer, shapes in found.items() for name, shape in shapes.items()]
    assert flat == list(wanted.items())


@pytest.mark.parametrize(
    ("radius", "down_factor", "name"),
    [
        (8, None, "clear_local_8.safetensors"),
        (16.0, None, "clear_local_16.safetensors"),
        (32, None, "clear_local_32.safetensors"),
        (8, 4, "clear_local_8_down_4.safetensors"),
        (2.5, 2, "clear_local_2.5_down_2.safetensors"),
    ],
)
def test_files_are_called_as_the_published_ones(radius: float, down_factor: int | None, name: str) -> None:
    assert weights_files.file_name(radius, down_factor) == name


@pytest.mark.parametrize("down_factor", [None, 2])
def test_what_is_saved_is_loaded_again_bit_for_bit(down_factor: int | None, model: Any, tmp_path: Path) -> None:
    weights = cases.random_weights(model, down_factor)
    file = tmp_path / "new" / "folder" / weights_files.file_name(3, down_factor)
    weights_files.save(file, weights, radius=3)
    assert load_file(file).keys() == {f"{layer}.{name}" for layer in weights for name in weights[layer]}
    expected = weights_files.shapes_by_layer(cases.attention(model), down_factor)
    again = weights_files.read(file, expected, "FluxTransformer2DModel")
    assert {layer: set(tensors) for layer, tensors in again.items()} == {x: set(weights[x]) for x in weights}
    assert all(torch.equal(again[layer][name], weights[layer][name]) for layer in weights for name in weights[layer])
    assert list(tmp_path.glob("new/folder/*")) == [file]


@pytest.mark.parametrize("trainable", [False, True])
def test_a_layer_gives_its_tensors_back_by_their_published_names(trainable: bool, model: Any) -> None:
    for tensors in cases.random_weights(model, 2).values():
        layer = ClearLayer(tensors, trainable=trainable)
        found = dict(layer.published())
        assert list(found) == list(tensors)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert len(list(layer.parameters())) == (len(tensors) if trainable else 0)
        assert layer.state_dict().keys() == dict(layer.named_parameters()).keys()
        assert layer.pooling is not None
        assert torch.equal(layer.pooling, tensors["processor.spatial_weight"][0, 0, 0, :, 0, :, 0])


def test_a_students_first_weights_are_the_models_own(model: Any, tmp_path: Path) -> None:
    first = {name: weights_files.from_stock(attn, 2) for name, attn in cases.attention(model).items()}
    for layer, attn in cases.attention(model).items():
        own = dict(attn.named_parameters())
        pooling = first[layer].pop("processor.spatial_weight")
        assert torch.equal(pooling, torch.full((1, 1, 1, 2, 1, 2, 1), 0.25))
        assert all(torch.equal(tensor, own[name]) for name, tensor in first[layer].items())
        assert all(tensor.data_ptr() != own[name].data_ptr() for name, tensor in first[layer].items())
        assert set(first[layer]) == {name for name in own if name.startswith(("to_q", "to_k", "to_v", "to_out"))}
    with attnswap.enabled(model, Clear(radius=3)):
        wanted = cases.call(model, (6, 8))
    weights_files.save(tmp_path / "own.safetensors", first)
    with attnswap.enabled(model, Clear(radius=3, weights=str(tmp_path))):
        assert torch.equal(cases.call(model, (6, 8)), wanted)


@pytest.mark.parametrize("name", ["sd3", "qwen_image", "z_image"])
def test_other_families_take_weights_too(name: str, tmp_path: Path) -> None:
    """Their own, so that nothing changes, and then others."""
    pipe, arguments = tiny_dit.PIPELINES[name]()

    def run() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        out: torch.Tensor = pipe(**arguments, num_inference_steps=1, output_type="latent", generator=generator)[0]
        return out

    chosen = [layer.name for layer in attnswap.inspect(pipe, Clear(radius=2)).layers if layer.accelerated]
    attention = {layer: pipe.transformer.get_submodule(layer) for layer in chosen}
    own = {layer: weights_files.from_stock(attn) for layer, attn in attention.items()}
    with attnswap.enabled(pipe, Clear(radius=2)):
        wanted = run()
    for factor in (1, 2):
        weights = {layer: {key: factor * x for key, x in tensors.items()} for layer, tensors in own.items()}
        weights_files.save(tmp_path / "some.safetensors", weights)
        with attnswap.enabled(pipe, Clear(radius=2, weights=str(tmp_path))):
            assert torch.equal(run(), wanted) == (factor == 1)


# Where they are found.


@pytest.mark.parametrize("form", ["file", "folder", "another name", "home", "bundled", "hub"])
def test_weights_are_found(form: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "little-model" / "clear"
    weights = cases.write(folder, model, 3, 2)
    file = folder / "clear_local_3_down_2.safetensors"
    given = str(folder)
    if form == "file":
        given = str(file)
    elif form == "another name":
        file.rename(folder / "mine.safetensors")
    else:  # more than one: the settings choose
        cases.write(folder, model, 3, seed=1)
        cases.write(folder, model, 5, 2, seed=2)
    if form == "home":
        monkeypatch.setenv("HOME", str(tmp_path))
        given = "~/little-model/clear"
    elif form == "bundled":
        monkeypatch.setattr(weights_files, "BUNDLED", tmp_path)
        given = "little-model"
    elif form == "hub":
        asked = []

        def download(name: str, *, allow_patterns: list[str]) -> str:
            asked.append((name, allow_patterns))
            return str(folder)

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        given = "Huage001/CLEAR"
    with attnswap.enabled(model, Clear(radius=3, down_factor=2, weights=given)):
        for layer, attn in cases.attention(model).items():
            assert all(torch.equal(tensor, weights[layer][name]) for name, tensor in attn.clear.published())
    if form == "hub":
        assert asked == [("Huage001/CLEAR", ["clear_local_3_down_2.safetensors"])]


def test_weights_that_are_nowhere_are_refused(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights_files, "BUNDLED", tmp_path)
    cases.write(tmp_path / "little-model" / "clear", model)
    message = refused(model, Clear(weights="litle-model"))
    assert message == "no CLEAR weights 'litle-model': no such file or folder, nor bundled (little-model)"
    message = refused(model, Clear(weights="Huage001/CLEAR"))
    assert message.startswith("CLEAR weights Huage001/CLEAR are not on this machine and not to be had: ")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(tmp_path))
    assert "CLEAR weights Huage001/CLEAR have no clear_local_12.safetensors" in refused(
        model, Clear(radius=12, weights="Huage001/CLEAR")
    )


def test_a_folder_that_leaves_a_choice_or_none_is_refused_with_what_it_holds(model: Any, tmp_path: Path) -> None:
    config = Clear(radius=4, weights=str(tmp_path))
    says = f"{tmp_path}: expected clear_local_4.safetensors, or a single .safetensors file, found "
    assert refused(model, config) == says + "nothing"
    (tmp_path / "pytorch_model.bin").touch()
    assert refused(model, config) == says + "pytorch_model.bin"
    assert "pickles can run code" in refused(model, Clear(weights=str(tmp_path / "pytorch_model.bin")))
    cases.write(tmp_path, model, 2)
    cases.write(tmp_path, model, 3)
    assert "found clear_local_2.safetensors, clear_local_3.safetensors, pytorch_model.bin" in refused(model, config)


@pytest.mark.parametrize("told_by", ["name", "metadata"])
def test_another_radius_than_trained_for_is_used_with_a_warning(told_by: str, model: Any, tmp_path: Path) -> None:
    weights = cases.random_weights(model)
    name = "clear_local_8.safetensors" if told_by == "name" else "mine.safetensors"
    weights_files.save(tmp_path / name, weights, radius=None if told_by == "name" else 8)
    with pytest.warns(attnswap.AttnswapWarning, match="was trained for radius 8 and is used with 3"):
        handle = attnswap.enable(model, Clear(radius=3, weights=str(tmp_path)))
    assert notes(handle) == {f"{tmp_path / name} was trained for radius 8 and is used with 3": 1}
    assert notes(attnswap.enable(model, Clear(radius=8, weights=str(tmp_path)))) == {}


def test_a_radius_that_is_no_number_is_refused(model: Any, tmp_path: Path) -> None:
    flat = {f"{x}.{name}": tensor for x, found in cases.random_weights(model).items() for name, tensor in found.items()}
    save_file(flat, tmp_path / "mine.safetensors", {"radius": "wide"})
    message = refused(model, Clear(radius=3, weights=str(tmp_path)))
    assert message == f"{tmp_path / 'mine.safetensors'}: expected a number as its radius, found 'wide'"


# What does not fit.


def changed(folder: Path, down_factor: int | None = None, **changes: Any) -> Path:
    """The checkpoint of a folder with tensors exchanged, added, or (None) left out."""
    file = folder / weights_files.file_name(3, down_factor)
    tensors = {**load_file(file), **changes}
    save_file({key: value for key, value in tensors.items() if value is not None}, file)
    return file


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"transformer_blocks.0.attn.to_k.weight": torch.zeros(32, 16)},
            "expected transformer_blocks.0.attn.to_k.weight [32, 32], found [32, 16]",
        ),
        (
            {"single_transformer_blocks.1.attn.to_v.bias": None},
            "expected single_transformer_blocks.1.attn.to_v.bias [32], found nothing",
        ),
        (
            {"single_transformer_blocks.2.attn.to_q.weight": torch.zeros(32, 32)},
            "expected 20 tensors, found also single_transformer_blocks.2.attn.to_q.weight",
        ),
    ],
    ids=["shape", "missing", "extra"],
)
def test_tensors_that_do_not_fit_are_named(changes: Any, says: str, model: Any, tmp_path: Path) -> None:
    cases.write(tmp_path, model)
    file = changed(tmp_path, **changes)
    message = refused(model, Clear(radius=3, weights=str(tmp_path)))
    assert message == f"{file} does not fit FluxTransformer2DModel: {says}"


def test_weights_of_a_larger_model_are_refused_by_their_first_tensor(model: Any, tmp_path: Path) -> None:
    cases.write(tmp_path, cases.transformer(num_attention_heads=4))
    message = refused(model, Clear(radius=3, weights=str(tmp_path)))
    assert "expected transformer_blocks.0.attn.to_q.weight [32, 32], found [64, 64]" in message


@pytest.mark.parametrize(
    ("trained", "asked", "says"),
    [
        (
            2,
            None,
            "was trained with down_factor 2, and down_factor None was asked for; weights None are the model's own",
        ),
        (2, 4, "was trained with down_factor 2, and down_factor 4 was asked for; weights None are the model's own"),
        (
            None,
            4,
            "was trained with down_factor None, and down_factor 4 was asked for; weights None are the model's own",
        ),
    ],
)
def test_another_far_field_than_trained_for_is_refused(
    trained: int | None, asked: int | None, says: str, model: Any, tmp_path: Path
) -> None:
    cases.write(tmp_path, model, 3, trained)
    file = tmp_path / weights_files.file_name(3, trained)
    assert refused(model, Clear(radius=3, down_factor=asked, weights=str(file))) == f"{file} {says}"


def test_what_is_no_floating_point_or_no_whole_file_is_refused(model: Any, tmp_path: Path) -> None:
    cases.write(tmp_path, model)
    whole = changed(tmp_path, **{"transformer_blocks.0.attn.to_q.bias": torch.zeros(32, dtype=torch.int8)})
    config = Clear(radius=3, weights=str(tmp_path))
    assert "expected floating point in transformer_blocks.0.attn.to_q.bias, found I8" in refused(model, config)
    whole.write_bytes(whole.read_bytes()[:-100])
    assert f"{whole} is not a whole safetensors file" in refused(model, config)


def test_a_layer_that_projects_otherwise_takes_no_weights(tmp_path: Path) -> None:
    """A single block of FLUX.2 has one projection for queries, keys, values and its MLP."""
    model = image_models.CASES["flux2"].make()
    message = refused(model, Clear(radius=3, weights=str(tmp_path / "not looked for")))
    assert message.startswith("CLEAR weights replace to_q, to_k and to_v: single_transformer_blocks.0.attn, of Flux2P")
    assert message.endswith(" has no to_q; without weights clear works there")
    with pytest.raises(attnswap.WeightsError, match="the layer, of Flux2ParallelSelfAttention, has no to_q"):
        weights_files.from_stock(model.single_transformer_blocks[0].attn)


def test_split_projections_take_no_weights(model: Any, tmp_path: Path) -> None:
    """Tensor parallelism, whether it was there before or comes later."""
    cases.write(tmp_path, model)
    config = Clear(radius=3, weights=str(tmp_path))
    split = SimpleNamespace(tensor_parallel_config=object(), context_parallel_config=None)
    handle = attnswap.enable(model, config)
    model._parallel_config = split
    with pytest.raises(attnswap.WeightsError, match="tensor parallelism has split"):
        cases.call(model, (4, 4))
    handle.disable()
    assert "cannot replace projections that tensor parallelism has split over devices" in refused(model, config)
    with attnswap.enabled(model, Clear(radius=3)):
        cases.call(model, (4, 4))


def test_quantised_projections_are_replaced_by_the_checkpoints_in_full(model: Any, tmp_path: Path) -> None:
    """They have no shape to compare with, only the widths of their layer."""
    cases.write(tmp_path, model)
    config = Clear(radius=3, weights=str(tmp_path))
    with attnswap.enabled(model, config):
        wanted = cases.call(model, (6, 8))
    for attn in cases.attention(model).values():
        attn.to_q.weight = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    with attnswap.enabled(model, config):
        assert torch.equal(cases.call(model, (6, 8)), wanted)
    with pytest.raises(attnswap.WeightsError, match=r"own to_q cannot be taken over: its weights are torch\.uint8"):
        weights_files.from_stock(model.transformer_blocks[0].attn)


# Beside the model's own.


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("computed", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_checkpoint_takes_the_precision_of_the_model(stored: Any, computed: Any, model: Any, tmp_path: Path) -> None:
    weights = cases.random_weights(model.to(computed), 2)
    halves = {layer: {name: x.to(stored) for name, x in tensors.items()} for layer, tensors in weights.items()}
    weights_files.save(tmp_path / "any.safetensors", halves)
    with attnswap.enabled(model, Clear(radius=3, down_factor=2, weights=str(tmp_path))):
        for attn in cases.attention(model).values():
            assert {tensor.dtype for _, tensor in attn.clear.published()} == {computed}
            assert attn.clear.pooling.dtype == torch.float32


def test_what_is_saved_meanwhile_is_the_stock_model(model: Any, tmp_path: Path) -> None:
    cases.write(tmp_path / "weights", model, 3, 2)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with attnswap.enabled(model, Clear(radius=3, down_factor=2, weights=str(tmp_path / "weights"))):
        model.save_pretrained(tmp_path / "model")
    saved = load_file(tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[key], state[key]) for key in state)
