"""LinFusion checkpoints: the published layout, every form they come in, bundled and automatic ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attnswap
import pytest
import torch
from attnswap.accel.methods import linfusion_weights as weights_files
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from .. import tiny
from . import linfusion_cases as cases
from .common import call
from .test_linfusion_refused import refused

SHAPES = {
    "to_q.weight": "CC",
    "to_k.weight": "CC",
    "to_v.weight": "CC",
    "to_out.0.weight": "CC",
    "to_out.0.bias": "C",
    "to_q_.0.weight": "mC",
    "to_q_.0.bias": "m",
    "to_q_.1.weight": "m",
    "to_q_.1.bias": "m",
    "to_q_.3.weight": "Cm",
    "to_q_.3.bias": "C",
    "to_k_.0.weight": "mC",
    "to_k_.0.bias": "m",
    "to_k_.1.weight": "m",
    "to_k_.1.bias": "m",
    "to_k_.3.weight": "Cm",
    "to_k_.3.bias": "C",
}
# The published index, in its order: block, attentions, transformer blocks in each, channels, heads.
Blocks = list[tuple[str, int, int, int, int]]
LIKE_SD: Blocks = [
    ("down_blocks.0", 2, 1, 320, 8),
    ("down_blocks.1", 2, 1, 640, 8),
    ("down_blocks.2", 2, 1, 1280, 8),
    ("up_blocks.1", 3, 1, 1280, 8),
    ("up_blocks.2", 3, 1, 640, 8),
    ("up_blocks.3", 3, 1, 320, 8),
    ("mid_block", 1, 1, 1280, 8),
]
PUBLISHED: dict[str, Blocks] = {
    "Yuanshi/LinFusion-1-5": LIKE_SD,
    "Yuanshi/LinFusion-2-1": [(*block[:4], block[3] // 64) for block in LIKE_SD],
    "Yuanshi/LinFusion-XL": [
        ("down_blocks.1", 2, 2, 640, 10),
        ("down_blocks.2", 2, 10, 1280, 20),
        ("up_blocks.0", 3, 10, 1280, 20),
        ("up_blocks.1", 3, 2, 640, 10),
        ("mid_block", 1, 10, 1280, 20),
    ],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Yuanshi/LinFusion-1-5": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "Yuanshi/LinFusion-2-1": {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
        "sample_size": 96,
    },
    "Yuanshi/LinFusion-XL": {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
    },
}


def published_layers(name: str) -> list[dict[str, Any]]:
    narrow = name.endswith("XL")
    return [
        {
            "module_name": f"{block}.attentions.{i}.transformer_blocks.{j}.attn1",
            "dim_n": channels,
            "heads": heads,
            "projection_mid_dim": channels // 16 if narrow else None,
        }
        for block, attentions, depth, channels, heads in PUBLISHED[name]
        for i in range(attentions)
        for j in range(depth)
    ]


def real_unet(name: str) -> UNet2DConditionModel:
    """A base of the published weights without any of its own."""
    with torch.device("meta"):
        return UNet2DConditionModel(**CONFIGS[name])


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_layout_is_the_published_one(name: str, tmp_path: Path) -> None:
    attention = cases.self_attention(real_unet(name))
    layers = weights_files.layers_of(attention)
    if name.endswith("XL"):
        layers = [weights_files.LayerShape(x.module_name, x.dim_n, x.heads, x.dim_n // 16) for x in layers]
    wanted = published_layers(name)
    assert [vars(layer) for layer in layers] == wanted
    for layer, entry in zip(layers, wanted, strict=True):
        sizes = {"C": entry["dim_n"], "m": entry["projection_mid_dim"] or entry["dim_n"]}
        shapes = {key: tuple(sizes[side] for side in shape) for key, shape in SHAPES.items()}
        assert list(layer.shapes().items()) == list(shapes.items())
    weights_files.save(tmp_path, layers, [])
    # To the byte, where the size of the published file is known.
    sizes_known = {"Yuanshi/LinFusion-1-5": 2667, "Yuanshi/LinFusion-XL": 11309}
    size = (tmp_path / "config.json").stat().st_size
    assert size == sizes_known.get(name, size)
    assert json.loads((tmp_path / "config.json").read_text())["modules_list"] == wanted


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_base_is_recognised_by_its_layers_whatever_it_is_called(name: str) -> None:
    unet = real_unet(name)
    unet.register_to_config(_name_or_path="somebody/fine-tuned-it")
    [remark] = attnswap.inspect(unet, "linfusion").remarks
    assert remark == f"weights: {name} (auto)"
    assert attnswap.inspect(unet, "linfusion").accelerated == len(published_layers(name))


def test_the_weights_of_every_layer_arrive_in_it(tmp_path: Path) -> None:
    unet = tiny.sdxl_unet()
    weights = cases.write(tmp_path, unet, 3)
    with attnswap.enabled(unet, attnswap.LinFusion(weights=str(tmp_path))):
        for attn, tensors in zip(cases.self_attention(unet).values(), weights, strict=True):
            loaded = dict(attn.linfusion.published())
            assert list(loaded) == list(SHAPES)
            assert all(torch.equal(loaded[key], tensors[key]) for key in SHAPES)


@pytest.mark.parametrize("mid", [None, 3, -1])
def test_what_is_saved_is_loaded_again_bit_for_bit(mid: int | None, tmp_path: Path) -> None:
    unet = tiny.sd15_unet()
    weights = cases.random_weights(unet, mid)
    layers = weights_files.layers_of(cases.self_attention(unet), mid)
    weights_files.save(tmp_path / "new" / "folder", layers, weights)
    again = weights_files.load(str(tmp_path / "new" / "folder"), layers, "U-Net")
    for saved, loaded in zip(weights, again, strict=True):
        assert saved.keys() == loaded.keys()
        assert all(torch.equal(saved[key], loaded[key]) for key in saved)


def rekeyed(folder: Path, unet: nn.Module) -> None:
    """The same weights under the dotted names of the layers."""
    file, names = folder / weights_files.WEIGHTS, list(cases.self_attention(unet))
    found = {key.partition(".")[0::2]: x for key, x in load_file(file).items()}
    save_file({f"{names[int(i)]}.{rest}": x for (i, rest), x in found.items()}, file)


def without_config(folder: Path, unet: nn.Module) -> None:
    (folder / weights_files.CONFIG).unlink()


def beside_the_config_of_something_else(folder: Path, unet: nn.Module) -> None:
    (folder / weights_files.CONFIG).write_text('{"_class_name": "UNet2DConditionModel"}')


def with_fused_copies(folder: Path, unet: nn.Module) -> None:
    file = folder / weights_files.WEIGHTS
    save_file({**load_file(file), "0.to_qkv.weight": torch.zeros(24, 8)}, file)


def as_published(folder: Path, unet: nn.Module) -> None:
    pass


ANYWHERE = [as_published, rekeyed, with_fused_copies]
FILE_ONLY = [without_config, beside_the_config_of_something_else]  # a folder is known by its config
FORMS = [(form, True) for form in (*ANYWHERE, *FILE_ONLY)] + [(form, False) for form in ANYWHERE]


@pytest.mark.parametrize("mid", [None, 3, -1])
@pytest.mark.parametrize(
    ("change", "as_file"), FORMS, ids=[f"{form.__name__}-{'file' if file else 'folder'}" for form, file in FORMS]
)
def test_every_form_of_a_checkpoint_gives_the_same(change: Any, mid: int | None, as_file: bool, tmp_path: Path) -> None:
    unet = tiny.sd15_unet(layers_per_block=1)
    weights = cases.write(tmp_path, unet, mid)
    change(tmp_path, unet)
    given = tmp_path / weights_files.WEIGHTS if as_file else tmp_path
    layers = weights_files.layers_of(cases.self_attention(unet))
    for tensors, loaded in zip(weights, weights_files.load(str(given), layers, "U-Net"), strict=True):
        assert tensors.keys() == loaded.keys()
        assert all(torch.equal(tensors[key], loaded[key]) for key in tensors)


def test_a_path_a_home_folder_and_another_file_name_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny.sd15_unet(layers_per_block=1)
    cases.write(tmp_path / "mine", unet)
    (tmp_path / "mine" / weights_files.WEIGHTS).rename(tmp_path / "mine" / "model.fp16.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in (tmp_path / "mine", "~/mine"):
        with attnswap.enabled(unet, attnswap.LinFusion(weights=given)) as handle:
            assert handle.report().to_dict()["config"]["weights"] == str(given)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("computed", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_a_checkpoint_takes_the_precision_of_the_model(stored: Any, computed: Any, tmp_path: Path) -> None:
    unet = tiny.sd15_unet(layers_per_block=1).to(computed)
    cases.write(tmp_path, unet, dtype=stored)
    with attnswap.enabled(unet, attnswap.LinFusion(weights=str(tmp_path))):
        assert {x.dtype for attn in cases.self_attention(unet).values() for x in attn.linfusion.buffers()} == {computed}


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return tiny.sd15_unet(layers_per_block=1)


# Bundled and automatic.


@pytest.fixture
def bundled(unet: UNet2DConditionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(weights_files, "BUNDLED", tmp_path)
    (tmp_path / "another" / "linfusion").mkdir(parents=True)
    cases.write(tmp_path / "another" / "linfusion", tiny.sdxl_unet())
    cases.write(tmp_path / "little-model" / "linfusion", unet)
    return "little-model"


def test_bundled_weights_are_found_by_name_and_by_their_layers(unet: UNet2DConditionModel, bundled: str) -> None:
    cases.put_by_definition(by_formulas := tiny.sd15_unet(layers_per_block=1), cases.random_weights(unet))
    wanted = call(by_formulas, (8, 8))
    for weights, said in ((bundled, bundled), ("auto", f"{bundled} (auto)")):
        with attnswap.enabled(unet, attnswap.LinFusion(weights=weights)) as handle:
            torch.testing.assert_close(call(unet, (8, 8)), wanted, rtol=0, atol=2e-5)
            assert f"weights: {said}\n" in str(handle.report())
    assert "no such file or folder, nor bundled (another, little-model)" in refused(unet, "litle-model")


def test_published_weights_that_are_unstable_in_fp16_are_used_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unet = tiny.sd15_unet(layers_per_block=1)
    cases.write(tmp_path, unet)
    monkeypatch.setattr(weights_files, "_from_hub", lambda name: tmp_path)
    config = attnswap.LinFusion(weights="Yuanshi/LinFusion-2-1")
    attnswap.enable(unet, config)
    with pytest.warns(attnswap.AttnswapWarning, match="unstable in float16: use bfloat16"):
        handle = attnswap.enable(unet.half(), config)
    assert "unstable in float16" in str(handle.report())


def test_settings_survive_json(tmp_path: Path) -> None:
    for config in (attnswap.LinFusion(), attnswap.LinFusion(weights=None, eps=1), attnswap.LinFusion(weights=tmp_path)):
        again = json.loads(json.dumps(config.to_dict()))
        assert attnswap.LinFusion.from_dict(again) == config
