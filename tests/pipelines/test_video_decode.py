"""Clips decoded in chunks: the same frames, no further than asked for, and the autoencoder as it was before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from attnswap.pipelines import decode_video

BLOCKS = {"block_out_channels": (8,) * 4, "latent_channels": 4, "layers_per_block": 1}


def wan(**changes: Any) -> Any:
    blocks = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1}
    scales = {"temperal_downsample": [True, True], "scale_factor_spatial": 4}
    moments = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    return diffusers.AutoencoderKLWan(**{**blocks, **scales, **moments, **changes})


def small_wan_22() -> Any:
    """That of the 5B model: shortcuts around its blocks, pixels in patches."""
    return wan(is_residual=True, patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=8)


def cogvideox() -> Any:
    kinds = {"down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4}
    return diffusers.AutoencoderKLCogVideoX(**BLOCKS, **kinds, norm_num_groups=4)


def hunyuan_video() -> Any:
    kinds = {"down_block_types": ("HunyuanVideoDownBlock3D",) * 4, "up_block_types": ("HunyuanVideoUpBlock3D",) * 4}
    return diffusers.AutoencoderKLHunyuanVideo(**BLOCKS, **kinds, norm_num_groups=4)


def hunyuan_video_15() -> Any:
    match = {"downsample_match_channel": False, "upsample_match_channel": False}
    return diffusers.AutoencoderKLHunyuanVideo15(
        **BLOCKS, **match, spatial_compression_ratio=8, temporal_compression_ratio=4
    )


def ltx() -> Any:
    scaling = (True, True, False, False)
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=scaling,
        decoder_spatio_temporal_scaling=scaling,
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
        timestep_conditioning=False,
        decoder_causal=False,
    )


def mochi() -> Any:
    widths = {"encoder_block_out_channels": (32,) * 4, "decoder_block_out_channels": (32,) * 4}
    return diffusers.AutoencoderKLMochi(**widths, latent_channels=4, out_channels=3, layers_per_block=(1,) * 5)


def made(build: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return build().eval()


def latents(frames: int, side: int = 2) -> torch.Tensor:
    return torch.randn(1, 4, frames, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def whole(vae: Any, of: torch.Tensor) -> torch.Tensor:
    return vae.decode(of, return_dict=False)[0]


def chunked(vae: Any, of: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(decode_video.chunks(vae, lambda part: whole(vae, part), of)), 2)


class TestTheSameBits:
    @pytest.mark.parametrize("build", [wan, small_wan_22])
    @pytest.mark.parametrize("frames", [1, 4])
    def test_wan(self, build: Callable[[], Any], frames: int) -> None:
        vae, z = made(build), latents(frames)
        assert torch.equal(chunked(vae, z), whole(vae, z))

    @pytest.mark.parametrize("frames", [1, 2, 5, 6])
    def test_cogvideox(self, frames: int) -> None:
        vae, z = made(cogvideox), latents(frames)
        assert torch.equal(chunked(vae, z), whole(vae, z))

    @pytest.mark.parametrize("frames", [4, 5, 8])  # one piece; a last one of one frame; of a few
    def test_hunyuan_video(self, frames: int) -> None:
        vae, z = made(hunyuan_video), latents(frames)
        assert torch.equal(chunked(vae, z), whole(vae, z))

    @pytest.mark.parametrize(
        ("build", "tile", "stride"), [(wan, 16, 12), (small_wan_22, 32, 24), (cogvideox, 16, None)]
    )
    def test_in_tiles(self, build: Callable[[], Any], tile: int, stride: int | None) -> None:
        vae, z = made(build), latents(3, side=5)
        untiled = whole(vae, z)
        vae.enable_tiling(tile, tile, *([stride, stride] if stride else []))
        tiled = whole(vae, z)
        assert not torch.equal(tiled, untiled)
        assert torch.equal(chunked(vae, z), tiled)

    def test_is_not_remarked_upon(self) -> None:
        assert not any(decode_video.remark(made(build), latents(50)) for build in (wan, cogvideox, hunyuan_video))


class TestNearlyTheSame:
    @pytest.mark.parametrize(("build", "ratio"), [(ltx, 4), (mochi, 6), (hunyuan_video_15, 4)])
    def test_with_latent_frames_around_a_chunk(
        self, build: Callable[[], Any], ratio: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(decode_video, "CHUNK", 3)
        vae, z = made(build), latents(16)
        found, expected = chunked(vae, z), whole(vae, z)
        assert found.shape[2] == expected.shape[2] == 15 * ratio + 1
        difference = (found - expected).abs().mean(), expected.std()
        assert difference[0] < 0.03 * difference[1]

    @pytest.mark.parametrize("build", [ltx, mochi, hunyuan_video_15])
    def test_is_said_where_the_clip_is_too_long_to_be_decoded_whole(self, build: Callable[[], Any]) -> None:
        vae = made(build)
        held = 24 if build is ltx else 16
        assert decode_video.remark(vae, latents(held)) is None
        assert "not the same" in str(decode_video.remark(vae, latents(held + 1)))


def test_an_unknown_autoencoder_is_not_decoded_in_chunks() -> None:
    assert not decode_video.streams(torch.nn.Identity())


class TestNoFurtherThanAskedFor:
    @pytest.mark.parametrize(
        ("build", "frames", "calls"), [(wan, 5, 1), (cogvideox, 7, 1), (hunyuan_video, 10, 1), (mochi, 17, 1)]
    )
    def test_the_first_chunk_takes_one_call_of_the_decoder(
        self, build: Callable[[], Any], frames: int, calls: int
    ) -> None:
        vae = made(build)
        seen: list[int] = []
        vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
        first = next(decode_video.chunks(vae, lambda part: whole(vae, part), latents(frames)))
        assert len(seen) == calls
        assert max(seen) < frames
        assert 0 < first.shape[2] < whole(vae, latents(frames)).shape[2]

    @pytest.mark.parametrize("build", [wan, cogvideox])
    def test_one_stopped_half_way_leaves_the_autoencoder_as_it_was(self, build: Callable[[], Any]) -> None:
        vae, z = made(build), latents(5)
        expected = whole(vae, z)
        part = decode_video.chunks(vae, lambda part: whole(vae, part), z)
        next(part)
        part.close()  # type: ignore[attr-defined]
        assert not vae.decoder._forward_pre_hooks
        assert not vae.decoder._forward_hooks
        assert not any(isinstance(kept, torch.Tensor) for kept in getattr(vae, "_feat_map", []))
        assert torch.equal(whole(vae, z), expected)
