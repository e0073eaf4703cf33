"""Less memory, the same picture, and afterwards nothing of it is left; in any order with methods and offloading."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import attnswap
import pytest
import torch
from attnswap.pipelines import low_memory as module
from attnswap.pipelines.low_memory import in_halves, in_parts_of_tokens, low_memory, tiled, untileable
from diffusers import AutoencoderTiny
from diffusers.models.attention import FeedForward

from ..accel.tiny_dit import PIPELINES


def run(pipe: Any, side: int = 64, **more: Any) -> torch.Tensor:
    arguments = {
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "output_type": "latent",
        "width": side,
        "height": side,
    }
    generator = torch.Generator().manual_seed(0)
    latents: torch.Tensor = pipe("a fox", generator=generator, **{**arguments, **more}).images
    return latents


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for rounding, which the sampler scales with the noise it starts from."""
    torch.testing.assert_close(found, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)


def hooks(pipe: Any) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in pipe.unet.modules())


@pytest.fixture
def batches(pipe: Any) -> list[int]:
    """The batch of every run of the U-Net's first convolution."""
    seen: list[int] = []
    pipe.unet.conv_in.register_forward_hook(lambda _module, args, _output: seen.append(len(args[0])))
    return seen


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models have few tokens: part them all the same."""
    monkeypatch.setattr(module, "FF_LEAST_TOKENS", 3)


class TestPicture:
    def test_is_the_same(self, pipe: Any, batches: list[int]) -> None:
        expected = run(pipe)
        with low_memory(pipe):
            found = run(pipe)
        same(found, expected)
        assert batches == [2, 2] + [1] * 4

    def test_is_the_same_without_guidance(self, pipe: Any, batches: list[int]) -> None:
        expected = run(pipe, guidance_scale=1.0)
        with low_memory(pipe):
            same(run(pipe, guidance_scale=1.0), expected)
        assert set(batches) == {1}

    def test_of_several_prompts_at_once(self, sd: Any) -> None:
        expected = run(sd, num_images_per_prompt=3)
        with low_memory(sd):
            same(run(sd, num_images_per_prompt=3), expected)

    def test_with_a_timestep_for_each_and_an_output_with_a_name(self, sd: Any) -> None:
        sample, text, t = torch.randn(4, 4, 8, 8), torch.randn(4, 5, 16), torch.tensor([10, 200, 3, 40])
        with torch.no_grad():
            expected = sd.unet(sample=sample, timestep=t, encoder_hidden_states=text).sample
            with in_halves(sd.unet):
                found = sd.unet(sample=sample, timestep=t, encoder_hidden_states=text).sample
        same(found, expected)


class TestFeedForward:
    @pytest.mark.parametrize("tokens", [1, 5, 16, 17, 64, 100])
    def test_any_number_of_tokens_in_at_most_so_many_parts(self, tokens: int) -> None:
        layer, sizes = FeedForward(8), []
        layer.net[0].register_forward_hook(lambda _module, args, _output: sizes.append(args[0].shape[1]))
        states = torch.randn(2, tokens, 8)
        expected = layer(states)
        sizes.clear()
        with in_parts_of_tokens(layer, parts=4, least=5):
            torch.testing.assert_close(layer(states), expected)
        assert sum(sizes) == tokens
        assert len(sizes) == min(4, -(-tokens // 5))

    def test_of_every_block(self, pipe: Any) -> None:
        with low_memory(pipe) as said:
            assert f"{len(module.feed_forwards(pipe.unet))} feed-forward layers" in ", ".join(said)
        assert len(module.feed_forwards(pipe.unet)) >= 6

    @pytest.mark.parametrize("family", ["flux", "sd3", "qwen_image", "z_image"])
    def test_of_every_transformer(self, family: str) -> None:
        pipe, _ = PIPELINES[family]()
        assert len(module.feed_forwards(pipe.transformer)) >= 2


class TestAfterwards:
    def test_nothing_is_left(self, pipe: Any) -> None:
        before, expected = hooks(pipe), run(pipe)
        settings = {name: value for name, value in vars(pipe.vae).items() if not name.startswith("_")}
        with low_memory(pipe):
            assert hooks(pipe) > before
            assert pipe.vae.use_tiling
            assert pipe.vae.use_slicing
        assert hooks(pipe) == before
        assert {name: value for name, value in vars(pipe.vae).items() if not name.startswith("_")} == settings
        assert torch.equal(run(pipe), expected)

    def test_nothing_is_left_by_an_exception_inside_a_part(self, sd: Any) -> None:
        before, expected = hooks(sd), run(sd)

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        with low_memory(sd):
            hook = sd.unet.mid_block.register_forward_pre_hook(fail)
            with pytest.raises(ZeroDivisionError):
                run(sd)
            hook.remove()
            same(run(sd), expected)
        with pytest.raises(ZeroDivisionError), low_memory(sd):
            raise ZeroDivisionError
        assert hooks(sd) == before
        assert torch.equal(run(sd), expected)

    def test_tiles_that_were_on_stay_on(self, sd: Any) -> None:
        sd.vae.enable_tiling()
        side = sd.vae.tile_sample_min_size
        with tiled(sd.vae, 32):
            assert (sd.vae.tile_sample_min_size, sd.vae.tile_latent_min_size) == (32, 4)
        assert sd.vae.use_tiling
        assert sd.vae.tile_sample_min_size == side


class TestWithAMethod:
    """HiDiffusion acts at twice the native side; every part is a call of its own to it."""

    @pytest.mark.parametrize("method_first", [True, False])
    def test_in_either_order(self, pipe: Any, method_first: bool) -> None:
        stock = run(pipe, 128)
        with attnswap.enabled(pipe, "hidiffusion"):
            expected = run(pipe, 128)
        assert not torch.allclose(expected, stock, atol=1e-3)
        enter: list[Callable[[], Any]] = [lambda: attnswap.enabled(pipe, "hidiffusion"), lambda: low_memory(pipe)]
        with ExitStack() as stack:
            for one in enter if method_first else reversed(enter):
                stack.enter_context(one())
            same(run(pipe, 128), expected)
        assert torch.equal(run(pipe, 128), stock)

    def test_one_taken_out_before_the_other(self, sd: Any) -> None:
        stock, handle = run(sd, 128), attnswap.enable(sd, "hidiffusion")
        with low_memory(sd):
            handle.disable()
            same(run(sd, 128), stock)
        assert torch.equal(run(sd, 128), stock)


class TestWithOffload:
    @pytest.mark.parametrize("offload_first", [True, False])
    def test_in_either_order_and_in_every_run(self, pipe: Any, batches: list[int], offload_first: bool) -> None:
        expected = run(pipe)
        with ExitStack() as stack:
            if offload_first:
                pipe.enable_model_cpu_offload(device="cpu")
            stack.enter_context(low_memory(pipe))
            if not offload_first:
                pipe.enable_model_cpu_offload(device="cpu")
            batches.clear()
            for _ in range(2):  # the end of a run takes the hooks of offloading out and in again
                same(run(pipe), expected)
            assert batches == [1] * 8
        batches.clear()
        same(run(pipe), expected)
        assert batches == [2, 2]

    def test_leaf_by_leaf(self, sd: Any) -> None:
        expected = run(sd)
        sd.enable_group_offload(onload_device="cpu", offload_type="leaf_level")
        with low_memory(sd):
            same(run(sd), expected)


class TestAutoencoder:
    def test_tiles_work_both_ways(self, sd: Any) -> None:
        pixels, sizes = torch.rand(1, 3, 96, 96), []
        sd.vae.encoder.register_forward_hook(lambda _module, args, _output: sizes.append(args[0].shape[-1]))
        sd.vae.decoder.register_forward_hook(lambda _module, args, _output: sizes.append(8 * args[0].shape[-1]))
        with tiled(sd.vae, 64), torch.no_grad():
            latents = sd.vae.encode(pixels).latent_dist.mode()
            assert sd.vae.decode(latents).sample.shape == pixels.shape
        assert len(sizes) == 8
        assert max(sizes) == 64

    @pytest.mark.parametrize(("levels", "channels"), [(3, 12), (4, 4), (3, 4)])
    def test_of_the_small_kind_decodes_in_tiles_whatever_its_channels_and_factor(
        self, levels: int, channels: int
    ) -> None:
        torch.manual_seed(0)
        widths, blocks, factor = (4,) * levels, (1,) * levels, 2 ** (levels - 1)
        vae = AutoencoderTiny(
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            num_encoder_blocks=blocks,
            num_decoder_blocks=blocks,
            latent_channels=channels,
        ).eval()
        before, pixels, sizes = dict(vars(vae)), torch.rand(1, 3, 160, 128), []
        vae.decoder.register_forward_hook(lambda _module, args, _output: sizes.append(factor * args[0].shape[-1]))
        with torch.no_grad():
            whole = vae.encode(pixels).latents
            expected = vae.decode(whole).sample
            sizes.clear()
            with tiled(vae, 64):
                latents, found = vae.encode(pixels).latents, vae.decode(whole).sample
        assert latents.shape == whole.shape
        assert found.shape == expected.shape
        assert len(sizes) > 4
        assert max(sizes) == 64
        # Seams apart, the first tile is what it is in the whole.
        torch.testing.assert_close(found[..., :24, :24], expected[..., :24, :24])
        assert dict(vars(vae)) == before

    def test_of_the_small_kind_that_encodes_whole_says_so(self, sd: Any) -> None:
        sd.vae = AutoencoderTiny(latent_channels=12)
        with low_memory(sd) as said:
            assert "autoencoder in tiles, encoding whole" in said
        sd.vae = AutoencoderTiny()
        with low_memory(sd) as said:
            assert "autoencoder in tiles" in said

    def test_without_tiling_is_said(self, sd: Any) -> None:
        sd.vae = torch.nn.Identity()
        assert untileable(sd.vae) == "it has no tiling"
        with low_memory(sd) as said:
            assert "Identity not in tiles: it has no tiling" in said
