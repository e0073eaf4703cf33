"""Tiny random pipelines around image and video transformers, for what the engine must know about any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers as d
import torch
from PIL import Image


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _text(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _image_vae(channels: int, **changes: Any) -> d.AutoencoderKL:
    config: dict[str, Any] = {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": channels,
        "norm_num_groups": 2,
        "layers_per_block": 1,
    }
    return d.AutoencoderKL(**{**config, **changes}).eval()


def wan() -> tuple[Any, dict[str, Any]]:
    """Two transformers, one after the other; names its guidance branches and its steps."""

    def transformer() -> d.WanTransformer3DModel:
        return d.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=256,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ).eval()

    pipe = d.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=transformer(),
        transformer_2=transformer(),
        vae=d.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        ),
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=1.0),
        boundary_ratio=0.5,
    )
    text = {"prompt_embeds": _text(1, 8, 32), "negative_prompt_embeds": _text(1, 8, 32, seed=2)}
    return _quiet(pipe), {**text, "height": 32, "width": 48, "num_frames": 9, "guidance_scale": 2.0}


def _flux_parts(**changes: Any) -> dict[str, Any]:
    return {
        "scheduler": d.FlowMatchEulerDiscreteScheduler(),
        "text_encoder": None,
        "tokenizer": None,
        "text_encoder_2": None,
        "tokenizer_2": None,
        "vae": _image_vae(1, shift_factor=0.1),
        "transformer": d.FluxTransformer2DModel(
            **{
                "patch_size": 1,
                "in_channels": 4,
                "num_layers": 1,
                "num_single_layers": 1,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 32,
                "pooled_projection_dim": 32,
                "axes_dims_rope": [4, 4, 8],
                **changes,
            }
        ).eval(),
    }


_FLUX_TEXT: dict[str, Any] = {
    "prompt_embeds": _text(1, 8, 32),
    "pooled_prompt_embeds": _text(1, 32),
    "negative_prompt_embeds": _text(1, 8, 32, seed=2),
    "negative_pooled_prompt_embeds": _text(1, 32, seed=2),
    "true_cfg_scale": 2.0,
}


def flux() -> tuple[Any, dict[str, Any]]:
    """True guidance: two named calls a step, without a step index; timesteps divided by 1000."""
    return _quiet(d.FluxPipeline(**_flux_parts())), {**_FLUX_TEXT, "height": 16, "width": 16}


def kontext() -> tuple[Any, dict[str, Any]]:
    """Two calls a step without any name."""
    arguments = {**_FLUX_TEXT, "image": _text(1, 3, 32, 32).sigmoid(), "max_area": 1024, "_auto_resize": False}
    return _quiet(d.FluxKontextPipeline(**_flux_parts())), {**arguments, "height": 32, "width": 32}


def flux_fill() -> tuple[Any, dict[str, Any]]:
    """The picture and its mask are further channels of the same tokens."""
    text = {name: value for name, value in _FLUX_TEXT.items() if name.endswith("prompt_embeds") and "neg" not in name}
    pictures = {"image": _text(1, 3, 16, 16).sigmoid(), "mask_image": torch.ones(1, 1, 16, 16)}
    pipe = d.FluxFillPipeline(**_flux_parts(in_channels=4 + 4 + 4 * 4, out_channels=4))
    return _quiet(pipe), {**text, **pictures, "height": 16, "width": 16}


def flux2() -> tuple[Any, dict[str, Any]]:
    """A reference image; positions of four numbers."""
    transformer = d.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    ).eval()
    vae = d.AutoencoderKLFlux2(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=1,
        norm_num_groups=2,
        layers_per_block=1,
    ).eval()
    pipe = d.Flux2Pipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    picture = Image.fromarray((_text(64, 64, 3).sigmoid() * 255).byte().numpy())
    return _quiet(pipe), {"prompt_embeds": _text(1, 8, 32), "image": picture, "height": 16, "width": 16}


def sd35() -> tuple[Any, dict[str, Any]]:
    """Layers of image tokens alone."""
    return sd3(dual_attention_layers=(0,), qk_norm="rms_norm")


def sd3(**changes: Any) -> tuple[Any, dict[str, Any]]:
    transformer = d.SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        **changes,
    ).eval()
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipe = d.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=_image_vae(4),
        **dict.fromkeys(names),
    )
    text = {
        "prompt_embeds": _text(1, 8, 32),
        "pooled_prompt_embeds": _text(1, 64),
        "negative_prompt_embeds": _text(1, 8, 32, seed=2),
        "negative_pooled_prompt_embeds": _text(1, 64, seed=2),
    }
    return _quiet(pipe), {**text, "height": 16, "width": 16, "guidance_scale": 2.0}


def cogvideox() -> tuple[Any, dict[str, Any]]:
    transformer = d.CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=8,
        use_rotary_positional_embeddings=True,
    ).eval()
    vae = d.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    pipe = d.CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=d.CogVideoXDDIMScheduler()
    )
    text = {"prompt_embeds": _text(1, 8, 32), "negative_prompt_embeds": _text(1, 8, 32, seed=2)}
    return _quiet(pipe), {**text, "height": 32, "width": 32, "num_frames": 9, "guidance_scale": 2.0}


def hunyuan_video() -> tuple[Any, dict[str, Any]]:
    transformer = d.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    ).eval()
    vae = d.AutoencoderKLHunyuanVideo(
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    pipe = d.HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
        vae=vae,
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
    )
    text = {
        "prompt_embeds": _text(1, 8, 16),
        "prompt_attention_mask": torch.ones(1, 8),
        "pooled_prompt_embeds": _text(1, 8),
    }
    return _quiet(pipe), {**text, "height": 16, "width": 16, "num_frames": 9}


def ltx() -> tuple[Any, dict[str, Any]]:
    transformer = d.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=32,
    ).eval()
    vae = d.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
        timestep_conditioning=False,
        encoder_causal=True,
        decoder_causal=False,
    )
    pipe = d.LTXPipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
    )
    text = {
        "prompt_embeds": _text(1, 8, 32),
        "prompt_attention_mask": torch.ones(1, 8, dtype=torch.bool),
        "negative_prompt_embeds": _text(1, 8, 32, seed=2),
        "negative_prompt_attention_mask": torch.ones(1, 8, dtype=torch.bool),
    }
    return _quiet(pipe), {**text, "height": 32, "width": 32, "num_frames": 9, "guidance_scale": 2.0}


def qwen_image() -> tuple[Any, dict[str, Any]]:
    transformer = d.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    ).eval()
    vae = d.AutoencoderKLQwenImage(
        base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True]
    )
    pipe = d.QwenImagePipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    text = {
        "prompt_embeds": _text(1, 8, 16),
        "prompt_embeds_mask": torch.ones(1, 8, dtype=torch.long),
        "negative_prompt_embeds": _text(1, 6, 16, seed=2),
        "negative_prompt_embeds_mask": torch.ones(1, 6, dtype=torch.long),
    }
    return _quiet(pipe), {**text, "height": 32, "width": 32, "true_cfg_scale": 2.0}


def z_image() -> tuple[Any, dict[str, Any]]:
    """Its timestep grows: 1 - t / 1000."""
    transformer = d.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    ).eval()
    pipe = d.ZImagePipeline(
        scheduler=d.FlowMatchEulerDiscreteScheduler(),
        vae=_image_vae(16),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    text = {"prompt_embeds": [_text(7, 16)], "negative_prompt_embeds": [_text(5, 16, seed=2)]}
    return _quiet(pipe), {**text, "height": 32, "width": 32, "guidance_scale": 2.0}


#: Makes a pipeline and the arguments of a short run, each by its own road to guidance and timesteps.
PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "wan": wan,
    "flux": flux,
    "kontext": kontext,
    "sd3": sd3,
    "cogvideox": cogvideox,
    "hunyuan_video": hunyuan_video,
    "ltx": ltx,
    "qwen_image": qwen_image,
    "z_image": z_image,
}

#: Of the image families, and of their pipelines that lay out their tokens in another way.
IMAGES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "flux": flux,
    "kontext": kontext,
    "flux_fill": flux_fill,
    "flux2": flux2,
    "sd3": sd3,
    "sd35": sd35,
    "qwen_image": qwen_image,
    "z_image": z_image,
}
