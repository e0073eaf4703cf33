"""LinFusion weights and settings that are refused, in one line, and that a refusal changes nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import attnswap
import pytest
import torch
from attnswap.accel.methods import linfusion_weights as weights_files
from attnswap.accel.methods.linfusion_layer import LinFusionLayer
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn

from .. import tiny
from ..watching import unchanged
from . import linfusion_cases as cases
from .common import call


def refused(unet: nn.Module, weights: Any) -> str:
    """The error's one line; checks that nothing has changed, and that what was enabled before still is."""
    before = attnswap.enable(unet, attnswap.HiDiffusion(raunet=False))
    for road in (attnswap.enable, attnswap.attn_processors):
        with unchanged(unet), pytest.raises(attnswap.WeightsError) as caught:
            road(unet, attnswap.LinFusion(weights=weights))
        assert before.active
    before.disable()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return tiny.sd15_unet(layers_per_block=1)


def test_weights_of_another_base_are_refused_with_both_signatures(unet: nn.Module, tmp_path: Path) -> None:
    cases.write(tmp_path, tiny.sdxl_unet())
    message = refused(unet, tmp_path)
    assert str(tmp_path / "config.json") in message
    assert "16 channels" in message
    for here in (unet, tiny.sdxl_unet()):
        assert weights_files.signature(weights_files.layers_of(cases.self_attention(here))) in message
    assert "UNet2DConditionModel" in message


def test_weights_of_another_base_without_a_config_are_refused_too(unet: nn.Module, tmp_path: Path) -> None:
    cases.write(tmp_path, tiny.sdxl_unet())
    (tmp_path / "config.json").unlink()
    message = refused(unet, tmp_path / weights_files.WEIGHTS)
    assert "needs 0.to_q.weight [8, 8], found [16, 16]" in message
    assert "UNet2DConditionModel" in message


def test_a_base_with_as_many_layers_of_each_kind_in_other_places_is_told_apart(unet: nn.Module, tmp_path: Path) -> None:
    cases.write(tmp_path, unet)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("down_blocks.2", "down_blocks.3"))
    message = refused(unet, tmp_path)
    assert "expected down_blocks.2.attentions.0.transformer_blocks.0.attn1 (16)" in message
    assert "found down_blocks.3.attentions.0.transformer_blocks.0.attn1 (16)" in message


def damaged(folder: Path, **changes: Any) -> None:
    """A checkpoint with tensors exchanged, added, or (None) left out."""
    file = folder / weights_files.WEIGHTS
    tensors = load_file(file)
    for key, value in changes.items():
        tensors[key] = value if value is not None else tensors.pop(key)
        if value is None:
            del tensors[key]
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"2.to_k_.0.weight": torch.zeros(5, 16)}, "needs 2.to_k_.0.weight [16, 16], found [5, 16]"),
        ({"0.to_out.0.bias": None}, "needs 0.to_out.0.bias [8], found nothing"),
        ({"6.to_q.weight": torch.zeros(16, 16)}, "expected 119 tensors, found also 7.to_q.weight"),
        ({"0.to_extra.weight": torch.zeros(1)}, "expected 119 tensors, found also 0.to_extra.weight"),
    ],
    ids=["shape", "missing", "layer", "extra"],
)
def test_tensors_that_do_not_fit_are_named(changes: Any, says: str, unet: nn.Module, tmp_path: Path) -> None:
    count = len(cases.self_attention(unet))
    cases.write(tmp_path, unet)
    says = says.replace("119", str(17 * count)).replace("7.to_q", f"{count}.to_q")
    damaged(tmp_path, **{key.replace("6.to_q", f"{count}.to_q"): x for key, x in changes.items()})
    message = refused(unet, tmp_path)
    assert says in message
    assert str(tmp_path / weights_files.WEIGHTS) in message


def test_an_mlp_width_other_than_the_configs_is_refused(unet: nn.Module, tmp_path: Path) -> None:
    cases.write(tmp_path, unet, 3)
    (tmp_path / "config.json").write_text(json.dumps(cases.config(unet, 4)))
    assert "needs 0.to_q_.0.weight [4, 8], found [3, 8]" in refused(unet, tmp_path)


def truncated(folder: Path) -> None:
    file = folder / weights_files.WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def garbage(folder: Path) -> None:
    (folder / weights_files.WEIGHTS).write_bytes(b"not at all" * 100)


def empty_file(folder: Path) -> None:
    (folder / weights_files.WEIGHTS).write_bytes(b"")


@pytest.mark.parametrize("damage", [truncated, garbage, empty_file])
def test_a_damaged_file_is_refused(damage: Any, unet: nn.Module, tmp_path: Path) -> None:
    cases.write(tmp_path, unet)
    damage(tmp_path)
    assert f"{tmp_path / weights_files.WEIGHTS} is not a whole safetensors file" in refused(unet, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"modules_list": 3}',
        '{"modules_list": [3]}',
        '{"modules_list": [{}]}',
        '{"modules_list": [{"module_name": "a", "dim_n": [8], "heads": 2}]}',
        '{"modules_list": [{"module_name": "a", "dim_n": 8, "heads": "2"}]}',
    ],
)
def test_a_damaged_config_is_refused(text: str, unet: nn.Module, tmp_path: Path) -> None:
    cases.write(tmp_path, unet)
    (tmp_path / "config.json").write_text(text)
    assert f"{tmp_path / 'config.json'} is no LinFusion config" in refused(unet, tmp_path)


def test_a_pickle_is_never_read(unet: nn.Module, tmp_path: Path) -> None:
    cases.write(tmp_path, unet)
    pickled = tmp_path / "diffusion_pytorch_model.bin"
    (tmp_path / weights_files.WEIGHTS).rename(pickled)
    assert "pickles can run code" in refused(unet, pickled)
    message = refused(unet, tmp_path)
    assert f"expected {weights_files.WEIGHTS} beside config.json, found config.json, {pickled.name}" in message


def test_a_folder_without_weights_is_refused_with_what_it_holds(unet: nn.Module, tmp_path: Path) -> None:
    assert "expected config.json and diffusion_pytorch_model.safetensors, found nothing" in refused(unet, tmp_path)
    for name in "abcdefg":
        (tmp_path / name).touch()
    assert "found a, b, c, d, e and 2 more" in refused(unet, tmp_path)


@pytest.mark.parametrize("name", ["nothing-of-this-name", "/no/such/folder", "./relative/file.safetensors", "a/b/c"])
def test_weights_that_do_not_exist_are_refused(name: str, unet: nn.Module) -> None:
    message = refused(unet, name)
    assert f"no LinFusion weights {name!r}" in message
    assert "bundled" in message


def test_a_hub_id_that_is_not_on_this_machine_is_one_clear_line(
    unet: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = refused(unet, "Yuanshi/LinFusion-1-5")
    assert message.startswith("LinFusion weights Yuanshi/LinFusion-1-5 are not on this machine")
    assert "LinFusion weights somebody/with..dots" in refused(unet, "somebody/with..dots")


def test_a_base_for_which_nothing_was_published_is_told_to_distil(unet: nn.Module) -> None:
    message = refused(unet, "auto")
    assert "no LinFusion weights are known" in message
    assert "distil" in message
    counts = Counter((attn.to_q.in_features, attn.heads) for attn in cases.self_attention(unet).values())
    assert all(f"{count} of {width} channels and {heads} heads" in message for (width, heads), count in counts.items())
    assert attnswap.inspect(unet, "linfusion").remarks == ("weights: none known for these layers",)


def test_quantised_projections_cannot_stand_in_for_weights(unet: nn.Module, tmp_path: Path) -> None:
    config = cases.linfusion(tmp_path, unet)
    for attn in cases.self_attention(unet).values():
        attn.to_v.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    assert refused(unet, None) == "a layer's own to_v cannot be taken over: its weights are torch.uint8"
    with attnswap.enabled(unet, config):
        call(unet, (8, 8))  # those of a checkpoint need none of the U-Net's


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"weights": ""}, "weights must be"),
        ({"weights": 3}, "weights must be"),
        ({"eps": 0}, "eps must be a positive number that float32 can hold, got 0"),
        ({"eps": float("nan")}, "eps must be"),
        ({"eps": True}, "eps must be"),
        ({"eps": "small"}, "eps must be"),
    ],
)
def test_settings_no_unet_could_use_are_refused(settings: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        attnswap.LinFusion(**settings)


def test_whole_numbers_in_place_of_weights_are_refused(unet: nn.Module, tmp_path: Path) -> None:
    cases.write(tmp_path, unet)
    damaged(tmp_path, **{"0.to_q.weight": torch.zeros(8, 8, dtype=torch.int8)})
    assert "expected floating point in 0.to_q.weight, found I8" in refused(unet, tmp_path)


def test_an_epsilon_that_float32_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="positive number that float32 can hold, got 1e-40"):
        attnswap.LinFusion(eps=1e-40)


@pytest.mark.parametrize("beside", [None, "null", "{}"])
def test_a_single_file_without_a_config_is_taken_and_said_to_be_unchecked(
    unet: nn.Module, tmp_path: Path, beside: str | None
) -> None:
    cases.write(tmp_path, unet)
    config = tmp_path / "config.json"
    config.unlink() if beside is None else config.write_text(beside)
    with pytest.warns(attnswap.AttnswapWarning, match="the number of heads could not be checked"):
        attnswap.enable(unet, attnswap.LinFusion(weights=tmp_path / weights_files.WEIGHTS))


def test_processors_that_cannot_be_installed_leave_nothing_behind(
    unet: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cases.linfusion(tmp_path, unet)

    def full(*arguments: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(LinFusionLayer, "beside", full)
    with unchanged(unet), pytest.raises(MemoryError):
        attnswap.attn_processors(unet, config)
