"""Pictures on the way: what the finished one will be, made small, and nothing of the run is touched by them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from attnswap.pipelines import clip
from attnswap.pipelines.emoji_reference import psnr
from attnswap.pipelines.job import Job
from attnswap.pipelines.low_memory import tiled
from attnswap.pipelines.preview import MOST, SIDE, Preview
from attnswap.pipelines.routes import Stage
from attnswap.pipelines.session import Session
from PIL import Image

from ..accel import tiny, tiny_dit
from ..accel.families import test_mochi

# Model, side in pixels and prompt. FLUX is above the side at which latents are pooled, the others are at their own.
RUNS = {
    "emoji-sd": (64, "a fox on a blue background"),
    "emoji-flux": (256, "a fox on a blue background"),
    "emoji-video": (96, "a fox moving left on a green background"),
}


Given = tuple[Any, torch.Tensor, Stage]


@dataclasses.dataclass
class Run:
    """With previews, and without: what was written as pixels [F, H, W, 3], and what was seen on the way."""

    with_previews: np.ndarray
    without: np.ndarray
    seen: list[Image.Image | None]
    why_not: str | None


def frames_of(folder: Path) -> np.ndarray:
    files = sorted(folder.glob("*.png"))
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]).astype(np.float32) / 255


@pytest.fixture(scope="module", params=RUNS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    side, prompt = RUNS[request.param]
    folders = [tmp_path_factory.mktemp("made") for _ in range(2)]
    seen: list[Image.Image | None] = []
    with Session(Job("", model=request.param)) as session:
        preview = Preview(session.pipe)
        clips = clip.frames_argument(session.pipe) is not None
        job = Job(prompt, model=request.param, width=side, height=side, steps=3, seed=3)
        looks = [lambda stage, latents: seen.append(preview.picture(latents, stage)), None]
        for folder, look in zip(folders, looks, strict=True):
            where = {"frames_dir": folder / "frames"} if clips else {"output": folder / "made.png"}
            session.make([session.plan(dataclasses.replace(job, **where))], look=look)
    both = [frames_of(folder / "frames" if clips else folder) for folder in folders]
    return Run(*both, seen, preview.why_not)


class TestOfTrainedModels:
    def test_there_is_one_after_each_step(self, run: Run) -> None:
        assert run.why_not is None
        assert len(run.seen) == 3
        assert all(run.seen)

    def test_the_last_is_the_finished_picture_made_small(self, run: Run) -> None:
        """Of a clip its middle frame. Unscaled latents give 18 dB at most."""
        last, made = run.seen[-1], run.with_previews
        assert last is not None
        finished = Image.fromarray((made[len(made) // 2] * 255).round().astype(np.uint8))
        small = np.asarray(finished.resize(last.size, Image.Resampling.BOX), np.float32) / 255
        assert psnr(np.asarray(last, np.float32) / 255, small) > 23

    def test_the_result_is_that_without_them_bit_for_bit(self, run: Run) -> None:
        assert np.array_equal(run.with_previews, run.without)

    def test_they_are_small(self, run: Run) -> None:
        for picture in run.seen:
            assert picture is not None
            assert max(picture.size) <= SIDE


def mochi() -> tuple[Any, dict[str, Any]]:
    """With twelve channels, which its pipeline counts on."""
    pipe, given = test_mochi.mochi_pipeline()
    widths = {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4}
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLMochi(latent_channels=12, layers_per_block=(1,) * 5, **widths)
    pipe.register_modules(vae=vae.eval(), transformer=test_mochi.CASE.make(in_channels=12))
    return pipe, given


def qwen_image() -> tuple[Any, dict[str, Any]]:
    pipe, given = tiny_dit.qwen_image()
    pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.5, 0.5, 2.0, 1.0])
    return pipe, given


def shifted(make: Callable[[], tuple[Any, dict[str, Any]]]) -> Callable[[], tuple[Any, dict[str, Any]]]:
    def made() -> tuple[Any, dict[str, Any]]:
        pipe, given = make()
        pipe.vae.register_to_config(shift_factor=0.5)
        return pipe, given

    return made


def unet(pipe: Any, **more: Any) -> tuple[Any, dict[str, Any]]:
    text = torch.randn(1, 7, tiny.TEXT, generator=torch.Generator().manual_seed(1))
    given = {"prompt_embeds": text, "negative_prompt_embeds": -text, "height": 64, "width": 64, **more}
    pipe.set_progress_bar_config(disable=True)
    return pipe, given


def sdxl() -> tuple[Any, dict[str, Any]]:
    pooled = torch.ones(1, tiny.TEXT)
    pipe = tiny.sdxl()
    pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.5, 0.5, 2.0, 1.0])
    return unet(pipe, pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=pooled)


def animate_diff() -> tuple[Any, dict[str, Any]]:
    widths = tuple(tiny.sd15_unet().config.block_out_channels)
    adapter = diffusers.MotionAdapter(widths, 2, motion_norm_num_groups=2, motion_num_attention_heads=2)
    parts = {"text_encoder": None, "tokenizer": None, "scheduler": diffusers.DDIMScheduler()}
    made = diffusers.AnimateDiffPipeline(vae=tiny.vae(), unet=tiny.sd15_unet(), motion_adapter=adapter, **parts)
    return unet(made, num_frames=3)


FAMILIES = {
    **tiny_dit.PIPELINES,
    **tiny_dit.IMAGES,
    "sd3": shifted(tiny_dit.sd3),
    "sd35": shifted(tiny_dit.sd35),
    "z_image": shifted(tiny_dit.z_image),
    "qwen_image": qwen_image,
    "mochi": mochi,
    "sd15": lambda: unet(tiny.sd15()),
    "sdxl": sdxl,
    "animate_diff": animate_diff,
}


def last_of(pipe: Any, given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents after a run's last step, and the picture or first frame [3, H, W] it then makes of them."""
    seen: list[torch.Tensor] = []

    def keep(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"])
        return {}

    torch.manual_seed(0)
    output = pipe(**given, num_inference_steps=2, output_type="pt", callback_on_step_end=keep)
    return seen[-1], output.images[0] if hasattr(output, "images") else output.frames[0, 0]


def stage_of(given: dict[str, Any]) -> Stage:
    return Stage(1, 1, given["width"], given["height"], 2)


@pytest.mark.filterwarnings("ignore:In CPU autocast")
class TestOfAnyFamily:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_small_latents_give_the_finished_picture_itself(self, family: str) -> None:
        pipe, given = FAMILIES[family]()
        if "num_frames" in given:
            given["num_frames"] = 1  # autoencoders of clips know what comes before a frame, previews do not
        latents, finished = last_of(pipe, given)
        preview = Preview(pipe)
        picture = preview.picture(latents, stage_of(given))
        assert preview.why_not is None
        expected = (finished.permute(1, 2, 0).numpy() * 255).round()
        assert np.abs(np.asarray(picture, np.float32) - expected).max() <= 1

    @pytest.mark.parametrize("family", [name for name in FAMILIES if "num_frames" in FAMILIES[name]()[1]])
    def test_of_a_clip_it_is_one_frame(self, family: str) -> None:
        pipe, given = FAMILIES[family]()
        latents, _ = last_of(pipe, given)
        preview = Preview(pipe)
        picture = preview.picture(latents, stage_of(given))
        assert preview.why_not is None
        assert picture is not None
        assert picture.size == (given["width"], given["height"])


@pytest.fixture
def sd() -> Given:
    pipe = tiny.sd15()
    return pipe, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)), Stage(1, 1, 64, 64, 2)


class TestSize:
    def test_a_large_picture_is_pooled_in_its_own_proportions(self, sd: Given) -> None:
        pipe, *_ = sd
        picture = Preview(pipe).picture(torch.randn(1, 4, 64, 128), Stage(1, 1, 1024, 512, 2))
        assert picture is not None
        assert picture.size == (SIDE, SIDE // 2)

    def test_no_more_latents_than_are_cheap_are_decoded_whatever_a_latent_stands_for(self) -> None:
        pipe, _ = tiny_dit.z_image()  # two pixels a side
        decoded: list[tuple[int, ...]] = []
        pipe.vae.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(tuple(inputs[0].shape)))
        Preview(pipe).picture(torch.randn(1, 16, 512, 128), Stage(1, 1, 256, 1024, 2))
        assert decoded == [(1, 16, MOST, MOST // 4)]

    def test_of_a_batch_the_first_is_shown(self, sd: Given) -> None:
        pipe, latents, stage = sd
        both = Preview(pipe).picture(torch.cat([latents, -latents]), stage)
        assert np.array_equal(np.asarray(both), np.asarray(Preview(pipe).picture(latents, stage)))


class TestLeavesNoTrace:
    def test_in_random_numbers(self) -> None:
        """Of a decoder that draws noise."""
        pipe, _ = tiny_dit.ltx()
        changes = {"decoder_inject_noise": (True,) * 5, "timestep_conditioning": True}
        pipe.register_modules(vae=diffusers.AutoencoderKLLTXVideo.from_config({**pipe.vae.config, **changes}).eval())
        before = torch.get_rng_state()
        preview = Preview(pipe)
        assert preview.picture(torch.randn(1, 64, 8, generator=torch.Generator()), Stage(1, 1, 32, 32, 2))
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(1)
        assert not torch.equal(torch.get_rng_state(), before)

    def test_in_autograd(self, sd: Given) -> None:
        pipe, latents, stage = sd
        graphs: list[bool] = []
        pipe.vae.decoder.register_forward_hook(lambda _, inputs, output: graphs.append(output.requires_grad))
        with torch.enable_grad():
            assert Preview(pipe).picture(latents.requires_grad_(), stage)
        assert graphs == [False]

    def test_in_what_a_causal_autoencoder_remembers(self) -> None:
        pipe, _ = tiny_dit.wan()
        Preview(pipe).picture(torch.randn(1, 16, 3, 4, 4), Stage(1, 1, 32, 32, 2))
        assert pipe.vae._feat_map == [None] * len(pipe.vae._feat_map)

    def test_in_weights_and_settings(self, sd: Given) -> None:
        pipe, latents, stage = sd
        with tiled(pipe.vae, 32):
            settings = {name: value for name, value in vars(pipe.vae).items() if isinstance(value, bool | int | float)}
            weights = {name: (weight, weight.clone()) for name, weight in pipe.vae.named_parameters()}
            assert Preview(pipe).picture(latents, stage)
            assert settings == {name: vars(pipe.vae)[name] for name in settings}
        for name, weight in pipe.vae.named_parameters():
            same, value = weights[name]
            assert weight is same
            assert torch.equal(weight, value)

    def test_in_what_watches_the_denoiser(self, sd: Given) -> None:
        pipe, latents, stage = sd
        calls: list[str] = []
        pipe.unet.register_forward_pre_hook(lambda *_: calls.append("denoiser"))
        Preview(pipe).picture(latents, stage)
        assert calls == []


class TestWhyNot:
    def test_of_an_autoencoder_that_is_not_known(self) -> None:
        preview = Preview(SimpleNamespace(vae=torch.nn.Linear(2, 2)))
        assert preview.why_not == "previews do not know the autoencoder, Linear"

    def test_of_models_that_are_moved_about(self, sd: Given) -> None:
        """A model is placed when it first runs, which is after the preview is made."""
        pipe, latents, stage = sd
        preview = Preview(pipe)
        assert preview.why_not is None
        pipe.enable_model_cpu_offload(device="cpu")
        assert preview.picture(latents, stage) is None
        assert preview.why_not is not None
        assert "offloaded" in preview.why_not

    def test_of_layers_that_are_moved_about(self, sd: Given) -> None:
        pipe, *_ = sd
        pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
        assert "offloaded" in (Preview(pipe).why_not or "")

    @pytest.mark.parametrize(
        "shape", [(), (4,), (1, 4), (1, 64, 16), (1, 4, 8), (1, 3, 8, 8), (1, 4, 8, 9), (1, 8, 4, 8, 8), (0, 4, 8, 8)]
    )
    def test_of_odd_latents(self, sd: Given, shape: tuple[int, ...]) -> None:
        pipe, _, stage = sd
        preview = Preview(pipe)
        assert preview.picture(torch.zeros(shape), stage) is None
        assert str(shape) in (preview.why_not or "")

    def test_of_latents_that_have_broken(self, sd: Given) -> None:
        pipe, latents, stage = sd
        preview = Preview(pipe)
        assert preview.picture(latents * torch.nan, stage) is None
        assert preview.why_not == "AutoencoderKL gives not-a-number in float32"


def test_an_autoencoder_beyond_the_range_of_float16_is_not_black(sd: Given) -> None:
    """As that of SDXL, whose pipeline makes it float32 in the end."""
    pipe, latents, stage = sd
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight *= 3e5
    expected = np.asarray(Preview(pipe).picture(latents, stage), np.float32)
    pipe.vae.half()
    found = np.asarray(Preview(pipe).picture(latents, stage), np.float32)
    assert np.abs(found - expected).max() <= 4
    assert pipe.vae.dtype == torch.float16
