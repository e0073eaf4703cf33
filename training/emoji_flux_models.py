"""Builds the untrained parts of `emoji-flux`: T5 tokenizer and encoder, FLUX transformer, flow scheduler, pipeline.

All are stock Diffusers and Transformers classes. The CLIP tokenizer and encoder are made as for `emoji-sd`
(`emoji_models.py`); the autoencoder is `emoji-sd`'s own.
"""

from __future__ import annotations

import string

import torch
from torch import nn

TEXT_LENGTH = 16  # of both encoders: `max_sequence_length` for the pipeline
TEXT_WIDTH = 128


def build_t5_tokenizer(captions: list[str]):
    """A `T5Tokenizer` in which every caption word is one piece; other words fall apart into characters."""
    from transformers import T5Tokenizer

    words = sorted({word for caption in captions for word in caption.split()})
    letters = string.ascii_letters + string.digits + string.punctuation
    # Log-probabilities: one word always beats its letters.
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *(("▁" + word, -1.0) for word in words)]
    known = {piece for piece, _ in pieces}
    pieces += [(letter, -10.0) for letter in ("▁", *letters) if letter not in known]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


def build_t5(tokenizer, width: int = TEXT_WIDTH):
    """A two-layer `T5EncoderModel` (version 1.1: gated GELU), trained jointly."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=32,
            d_ff=2 * width,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def build_transformer(channels: int, heads: int = 3, double: int = 2, single: int = 6, text_width: int = TEXT_WIDTH):
    """`FluxTransformer2DModel` on 2×2 patches of `channels` latents; 64 channels a head, no guidance embedding.

    Modulation starts at zero, so every block starts as the identity (adaLN-Zero, DiT, arXiv 2212.09748).
    """
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=4 * channels,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=text_width,
        pooled_projection_dim=text_width,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
    for block in model.single_transformer_blocks:
        nn.init.zeros_(block.norm.linear.weight)
    for layer in (model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def build_scheduler():
    """Rectified flow with FLUX.1-dev's shift: exp(0.5) at 256 image tokens (the native 128 px), more above."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=4096, base_shift=0.5, max_shift=1.15
    )


def build_pipeline(transformer, text_encoder, tokenizer, text_encoder_2, tokenizer_2, autoencoder):
    """The stock pipeline around the parts."""
    from diffusers import FluxPipeline

    return FluxPipeline(
        scheduler=build_scheduler(),
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def pack(latents: torch.Tensor) -> torch.Tensor:
    """`[N, C, H, W]` → `[N, H/2·W/2, 4·C]`, as the pipeline packs."""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2).contiguous()


def unpack(tokens: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack` for a square picture."""
    count, length, channels = tokens.shape
    side = round(length**0.5)
    return nn.functional.pixel_shuffle(tokens.transpose(1, 2).reshape(count, channels, side, side), 2)


def image_ids(side: int, native: int) -> torch.Tensor:
    """Positions `[side², 3]` of a picture of side × side tokens, spread over the `native` × `native` grid."""
    line = (torch.arange(side) + 0.5) * (native / side) - 0.5
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([torch.zeros(side * side), rows.flatten(), columns.flatten()], -1)
