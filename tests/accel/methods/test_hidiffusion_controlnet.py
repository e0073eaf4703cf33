"""ControlNets with HiDiffusion: run near their trained size, fitted to pooled maps, left out after 0.6 of the steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attnswap
import pytest
import torch
from attnswap import HiDiffusion
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    DDIMScheduler,
    MultiControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
)
from torch import nn

from .. import tiny
from .common import ALWAYS, call, inputs, largest_difference, last_run, notes

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# Thin: the ControlNet is enlarged until its longer side is that of the training, 64 or 128.
SIDE = (8, 32)
SEEN = {"sd15": (16, 64), "sdxl": (32, 128)}


def with_weights(controlnet: nn.Module, seed: int = 0) -> nn.Module:
    """Fresh ControlNets end in zeros and would do nothing."""
    torch.manual_seed(seed)
    for parameter in controlnet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return controlnet.eval()


def controlnet_of(unet: Any, seed: int = 0) -> nn.Module:
    return with_weights(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 4)), seed)


def pipeline(cls: type, networks: int = 1, controlnet: nn.Module | None = None) -> Any:
    family = "sdxl" if "XL" in cls.__name__ else "sd15"
    slim = {"layers_per_block": 1} | ({"transformer_layers_per_block": 1} if family == "sdxl" else {})
    unet = getattr(tiny, f"{family}_unet")(**slim)
    if controlnet is None:
        found = [controlnet_of(unet, seed) for seed in range(networks)]
        controlnet = found[0] if networks == 1 else MultiControlNetModel(found)
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    more = {"image_encoder": None} if "Inpaint" in cls.__name__ and family == "sd15" else {}
    return getattr(tiny, family)(unet, scheduler, cls=cls, controlnet=controlnet, **more)


def picture(channels: int = 3, side: tuple[int, int] = SIDE) -> torch.Tensor:
    return torch.rand(1, channels, side[0] * 8, side[1] * 8, generator=torch.Generator().manual_seed(1))


def control(cls: type, networks: int = 1) -> dict[str, Any]:
    """The pictures a pipeline of this class wants."""
    image: Any = picture() if networks == 1 else [picture()] * networks
    if "Img2Img" in cls.__name__:
        return {"image": picture(), "control_image": image, "strength": 1.0}
    if "Inpaint" in cls.__name__:
        mask = (picture(1) > 0.5).float()
        return {"image": picture(), "mask_image": mask, "control_image": image, "strength": 1.0}
    return {"image": image}


@contextmanager
def watched(network: nn.Module) -> Iterator[list[tuple[tuple[int, int], tuple[int, int]]]]:
    """Sizes (h, w) of the latent and of the control image in every call of a ControlNet."""
    seen: list[tuple[tuple[int, int], tuple[int, int]]] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        sample = args[0] if args else kwargs["sample"]
        image = kwargs["controlnet_cond"]
        image = image[0] if isinstance(image, list) else image
        seen.append((tuple(sample.shape[-2:]), tuple(image.shape[-2:])))  # type: ignore[arg-type]

    hook = network.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize(
    "cls",
    [
        StableDiffusionControlNetPipeline,
        StableDiffusionControlNetImg2ImgPipeline,
        StableDiffusionControlNetInpaintPipeline,
        StableDiffusionXLControlNetPipeline,
        StableDiffusionXLControlNetImg2ImgPipeline,
        StableDiffusionXLControlNetInpaintPipeline,
    ],
)
def test_every_controlnet_pipeline_runs_at_the_trained_size_for_six_tenths_of_the_steps(cls: type) -> None:
    family = "sdxl" if "XL" in cls.__name__ else "sd15"
    height, width = SEEN[family]
    pipe = pipeline(cls)
    with attnswap.enabled(pipe, "hidiffusion") as handle, watched(pipe.controlnet) as seen:
        tiny.run(pipe, side=SIDE, steps=4, **control(cls))
        after = [size for size in seen if size != ((height, width), (height * 8, width * 8))]
        assert len(seen) - len(after) == math.ceil(0.6 * 4) == 3
        assert after == [((8, 8), (64, 64))]  # runs on next to nothing, and is dropped
        found = notes(handle)
        assert found[f"ControlNet saw a {height}x{width} latent, near its trained size, for 8x32"] == 3
        assert found["ControlNet left out after 0.6 of the steps"] == 1
        assert any("residuals resized to the maps of this step" in note for note in found)


def test_several_controlnets_each_see_their_own_picture_at_the_trained_size() -> None:
    cls = StableDiffusionControlNetPipeline
    pipe = pipeline(cls, networks=2)
    with attnswap.enabled(pipe, "hidiffusion"):
        first, second = pipe.controlnet.nets
        with watched(first) as one, watched(second) as other:
            both = tiny.run(pipe, side=SIDE, steps=2, controlnet_conditioning_scale=[1.0, 1.0], **control(cls, 2))
            assert one == other == [((16, 64), (128, 512))] * 2
        without = tiny.run(pipe, side=SIDE, steps=2, controlnet_conditioning_scale=[1.0, 0.0], **control(cls, 2))
    assert largest_difference(both, without) > 1e-3


def test_a_union_controlnet_runs_at_the_trained_size_and_counts_as_text_to_image() -> None:
    cls = StableDiffusionXLControlNetUnionPipeline
    torch.manual_seed(0)
    union = ControlNetUnionModel(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=1,
        cross_attention_dim=tiny.TEXT,
        attention_head_dim=(1, 2, 2),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + tiny.TEXT,
        conditioning_embedding_out_channels=(4, 4, 4, 4),
        num_trans_channel=8,
        num_trans_head=2,
        num_proj_channel=8,
    )
    pipe = pipeline(cls, controlnet=with_weights(union))
    with attnswap.enabled(pipe, "hidiffusion") as handle, watched(union) as seen:
        tiny.run(pipe, side=SIDE, steps=2, control_image=picture(), control_mode=0)
        assert seen == [((32, 128), (256, 1024))] * 2
        assert "text-to-image ControlNet" in str(handle.report())


@pytest.mark.parametrize(
    ("cls", "expected"),
    [(StableDiffusionXLControlNetPipeline, (0, 1)), (StableDiffusionXLControlNetImg2ImgPipeline, (0, 0))],
)
def test_text_to_image_with_a_controlnet_keeps_the_pooled_maps_longer(cls: type, expected: tuple[int, int]) -> None:
    """T1 is 0.5 there and 0.4 from a picture: of two steps, one and none."""
    pipe = pipeline(cls)
    with attnswap.enabled(pipe, "hidiffusion") as handle:
        tiny.run(pipe, side=SIDE, steps=2, **control(cls))
        assert last_run(handle)[1:] == expected
        assert ("text-to-image ControlNet" in str(handle.report())) is bool(expected[1])


def test_the_size_is_cut_to_eights_as_published() -> None:
    pipe = pipeline(StableDiffusionControlNetPipeline)
    side = (9, 31)  # 9 // (31 / 64) = 18, in eights 16
    with attnswap.enabled(pipe, "hidiffusion"), watched(pipe.controlnet) as seen:
        tiny.run(pipe, side=side, steps=1, image=picture(side=side))
    assert seen == [((16, 64), (128, 512))]


def test_the_end_and_the_interpolation_are_settings() -> None:
    pipe = pipeline(StableDiffusionControlNetPipeline)
    pictures = {}
    for resize in ("nearest", "area", "bicubic"):
        with attnswap.enabled(pipe, HiDiffusion(controlnet_resize=resize, controlnet_end=1.0)):
            with watched(pipe.controlnet) as seen:
                pictures[resize] = tiny.run(pipe, side=SIDE, steps=2, image=picture())
            assert [latent for latent, _ in seen] == [(16, 64)] * 2
    assert largest_difference(pictures["nearest"], pictures["bicubic"]) > 1e-4


def test_a_controlnet_that_is_left_out_from_the_start_is_none_at_all() -> None:
    pipe = pipeline(StableDiffusionControlNetPipeline)
    with attnswap.enabled(pipe, HiDiffusion(controlnet_end=0.0)):
        left_out = tiny.run(pipe, side=SIDE, steps=2, image=picture())
    plain = tiny.sd15(pipe.unet, DDIMScheduler(clip_sample=False, steps_offset=1))
    with attnswap.enabled(plain, "hidiffusion"):
        assert torch.equal(tiny.run(plain, side=SIDE, steps=2), left_out)


def test_at_native_size_nothing_is_touched() -> None:
    pipe = pipeline(StableDiffusionControlNetPipeline)
    stock = tiny.run(pipe, side=8, steps=3, image=picture(side=(8, 8)))
    with attnswap.enabled(pipe, "hidiffusion") as handle, watched(pipe.controlnet) as seen:
        assert torch.equal(tiny.run(pipe, side=8, steps=3, image=picture(side=(8, 8))), stock)
        assert seen == [((8, 8), (64, 64))] * 3
        assert notes(handle) == {}


def test_disabled_the_controlnet_is_stock_again() -> None:
    pipe = pipeline(StableDiffusionControlNetPipeline)
    stock = tiny.run(pipe, side=SIDE, steps=2, image=picture())
    with attnswap.enabled(pipe, "hidiffusion"):
        assert largest_difference(tiny.run(pipe, side=SIDE, steps=2, image=picture()), stock) > 1e-3
    assert torch.equal(tiny.run(pipe, side=SIDE, steps=2, image=picture()), stock)
    assert not any(module._forward_pre_hooks for module in pipe.controlnet.modules())


def test_guess_mode_keeps_its_batch_after_the_cut() -> None:
    pipe = pipeline(StableDiffusionControlNetPipeline)
    batches: list[Any] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        residual = kwargs.get("mid_block_additional_residual")
        batches.append(None if residual is None else len(residual))

    with attnswap.enabled(pipe, "hidiffusion"):
        hook = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
        tiny.run(pipe, side=SIDE, steps=5, image=picture(), guess_mode=True)
        hook.remove()
    assert batches == [2, 2, 2, None, None]


@pytest.mark.parametrize("size", [(16, 16), (17, 23)])
def test_residuals_given_to_a_bare_unet_are_fitted(size: tuple[int, int]) -> None:
    unet = tiny.sd15_unet()
    controlnet = controlnet_of(unet)
    given = inputs(unet, size)
    pictures = torch.rand(1, 3, size[0] * 8, size[1] * 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        down, middle = controlnet(timestep=900, controlnet_cond=pictures, return_dict=False, **given)
    handle = attnswap.enable(unet, ALWAYS)
    handle.set_timesteps(list(range(900, -1, -100)))
    controlled = call(unet, size, 900, down_block_additional_residuals=down, mid_block_additional_residual=middle)
    assert last_run(handle) == (10, 1, 0)
    assert largest_difference(controlled, call(unet, size, 900)) > 1e-3
    assert any("residuals resized" in note for note in notes(handle))
    handle.reset()
    handle.set_timesteps(list(range(900, -1, -100)))
    call(unet, size, 0, down_block_additional_residuals=down, mid_block_additional_residual=middle)
    assert notes(handle) == {}  # at the end of the run the maps have their own sizes again


def test_the_report_of_a_controlnet_run_is_one_screen_that_says_what_was_changed() -> None:
    pipe = pipeline(StableDiffusionXLControlNetPipeline)
    with attnswap.enabled(pipe, "hidiffusion") as handle:
        tiny.run(pipe, side=SIDE, steps=13, **control(StableDiffusionXLControlNetPipeline))
        text = str(handle.report())
    for part in ("text-to-image ControlNet", "32x128", "left out after 0.6", "residuals resized", "aggressive"):
        assert part in text
    assert len(text.splitlines()) < 16
