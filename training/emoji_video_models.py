"""Builds the parts of `emoji-video`: video autoencoder, UMT5 encoder, Wan transformer, scheduler, pipeline.

All are stock Diffusers and Transformers classes; the tokenizer is made as for `emoji-flux`. The autoencoder's encoder
is not trained: it is the principal component analysis (PCA) of 8×8 patches, over pairs of frames, written into
`AutoencoderKLWan`'s convolutions, so latents exist at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .emoji_flux_models import TEXT_WIDTH

PATCH = 8  # pixels a side of a latent position
FOLD = 4  # the autoencoder's own `patch_size`: its first layer sees 4×4 pixels as channels
PAIR = 2  # frames in a latent one, except the first
STILL, CHANGE = 24, 8  # latent channels: what two frames share, by how much they differ
LATENTS = STILL + CHANGE
LOUD = 128.0  # a constant beside the latents that makes the encoder's last normalisation do next to nothing
LOG_VARIANCE = -20.0  # the encoder is certain

# ---------------------------------------------------------------------------------------------------- autoencoder


def patches_of(frames: torch.Tensor) -> torch.Tensor:
    """`[..., 3, H, W]` → `[..., H/8, W/8, 192]`, channel-major as `pixel_unshuffle` has it."""
    return nn.functional.pixel_unshuffle(frames, PATCH).movedim(-3, -1)


@dataclass(frozen=True)
class Components:
    """The closed-form optimum of a linear autoencoder of patches, in -1..1.

    Attributes:
        mean: `[192]`, the mean patch.
        still: `[24, 192]`, what a latent reads from the mean of a pair of frames.
        change: `[8, 24]`, what it reads from half the change of `still` between the two.
    """

    mean: torch.Tensor
    still: torch.Tensor
    change: torch.Tensor


class Covariances:
    """Gathers what `Components` are computed from, clip by clip."""

    def __init__(self) -> None:
        self.count = 0
        self.sum = torch.zeros(3 * PATCH**2, dtype=torch.double)
        self.still = torch.zeros(2 * self.sum.shape, dtype=torch.double)
        self.change = torch.zeros(2 * self.sum.shape, dtype=torch.double)

    def add(self, clip: torch.Tensor) -> None:
        """A clip `[frames, 3, H, W]` in -1..1."""
        patches = patches_of(clip)
        before, after = patches[1::PAIR], patches[2::PAIR]
        still = torch.cat([patches[:1], (before + after) / 2]).flatten(0, 2)
        change = ((after - before) / 2).flatten(0, 2)
        self.count += len(still)
        self.sum += still.sum(0)
        self.still += still.T @ still
        self.change += change.T @ change

    def components(self) -> Components:
        """Half whitened channels (divided by the square root of their deviation), with a mean square of 1 over all.

        So the coarse channels, which decide what is seen, are loudest in the diffusion loss, the fine ones audible.
        """
        mean = self.sum / self.count
        values, vectors = torch.linalg.eigh(self.still / self.count - mean.outer(mean))
        values, still = values.flip(0)[:STILL], vectors.flip(1)[:, :STILL].T
        changes, vectors = torch.linalg.eigh(still @ (self.change / self.count) @ still.T)
        changes, change = changes.flip(0)[:CHANGE], vectors.flip(1)[:, :CHANGE].T
        gains = torch.cat([values, changes]).pow(-0.25)
        gains = gains / (gains.square() * torch.cat([values, changes])).mean().sqrt()
        still = still * gains[:STILL, None]
        change = change * gains[STILL:, None] / gains[:STILL]
        return Components(mean.float(), still.float(), change.float())


def encoder_weights(autoencoder, parts: Components) -> None:
    """Write the patch analysis into `WanEncoder3d`.

    Every latent channel is carried as itself and its negative, because SiLU(x) - SiLU(-x) = x; beside them runs the
    constant `LOUD`, which makes up nearly all of the norm that the last normalisation divides by. The first frame skips
    the convolution over time, so it has no change.
    """
    encoder = autoencoder.encoder
    for module in (encoder, autoencoder.quant_conv):
        for name, parameter in module.named_parameters():
            if "gamma" not in name:
                nn.init.zeros_(parameter)
    first, resample, last = encoder.conv_in, encoder.down_blocks[0], encoder.conv_out
    squeeze, pair = resample.resample[1], resample.time_conv
    width, loud = first.out_channels, 2 * LATENTS
    still, change = slice(0, STILL), slice(STILL, LATENTS)
    negative_still, negative_change = slice(LATENTS, LATENTS + STILL), slice(LATENTS + STILL, loud)
    folded = 3 * FOLD**2
    with torch.no_grad():
        first.weight[:folded, :, -1, 1, 1] = torch.eye(folded)
        # `patchify` orders a fold as (colour, column, row); a patch is 2×2 folds, its channels (colour, row, column).
        analysis = parts.still.reshape(STILL, 3, 2, FOLD, 2, FOLD)  # colour, fold row, row, fold column, column
        for row in range(2):
            for column in range(2):
                tap = analysis[:, :, row, :, column].transpose(2, 3).reshape(STILL, folded)
                squeeze.weight[still, :folded, row, column] = tap
                squeeze.weight[negative_still, :folded, row, column] = -tap
        offset = parts.still @ parts.mean
        squeeze.bias[still], squeeze.bias[negative_still], squeeze.bias[loud] = -offset, offset, LOUD
        # Taps over time: the latent frame before, and the two frames of the pair.
        for side, sign in ((still, 1), (negative_still, -1)):
            pair.weight[side, still, 1:, 0, 0] = sign * torch.eye(STILL)[..., None] / PAIR
        for side, sign in ((change, 1), (negative_change, -1)):
            pair.weight[side, still, 1, 0, 0] = -sign * parts.change / PAIR
            pair.weight[side, still, 2, 0, 0] = sign * parts.change / PAIR
        pair.bias[loud] = LOUD
        encoder.norm_out.gamma.fill_(LOUD / width**0.5)
        last.weight[:LATENTS, :LATENTS, -1, 1, 1] = torch.eye(LATENTS)
        last.weight[:LATENTS, LATENTS:loud, -1, 1, 1] = -torch.eye(LATENTS)
        autoencoder.quant_conv.weight[:, :, 0, 0, 0] = torch.eye(2 * LATENTS)
        autoencoder.quant_conv.bias[LATENTS:] = LOG_VARIANCE


def build_autoencoder(parts: Components, width: int = 64):
    """`AutoencoderKLWan`, 2× in time and 8× in space, with the closed-form encoder and an untrained decoder."""
    from diffusers import AutoencoderKLWan

    model = AutoencoderKLWan(
        base_dim=2 * LATENTS + 8,
        decoder_base_dim=width,
        z_dim=LATENTS,
        dim_mult=[1, 1],
        num_res_blocks=0,
        temperal_downsample=[True],
        latents_mean=[0.0] * LATENTS,
        latents_std=[1.0] * LATENTS,
        in_channels=3 * FOLD**2,
        out_channels=3 * FOLD**2,
        patch_size=FOLD,
        scale_factor_temporal=PAIR,
        scale_factor_spatial=PATCH,
    )
    encoder_weights(model, parts)
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    return model


def encode(autoencoder, clips: torch.Tensor) -> torch.Tensor:
    """Clips `[N, 3, F, H, W]` in -1..1 → latents `[N, 32, (F+1)/2, H/8, W/8]`; these are the transformer's."""
    return autoencoder.encode(clips).latent_dist.mode()


def linear_decode(latents: torch.Tensor, parts: Components) -> torch.Tensor:
    """The closed-form decoder, good enough to watch training by: `[N, 32, L, H, W]` → clips `[N, 3, F, H·8, W·8]`."""
    still, change = latents.movedim(1, -1).split([STILL, CHANGE], -1)
    change = change @ torch.linalg.pinv(parts.change).T
    pairs = torch.stack([still - change, still + change], 2).flatten(1, 2)[:, 1:]
    patches = pairs @ torch.linalg.pinv(parts.still).T + parts.mean
    return nn.functional.pixel_shuffle(patches.movedim(-1, -3), PATCH).transpose(1, 2).clamp(-1, 1)


# ------------------------------------------------------------------------------------------------------------ text


def build_text_encoder(tokenizer, width: int = TEXT_WIDTH):
    """A one-layer `UMT5EncoderModel`, trained jointly."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=32,
            d_ff=2 * width,
            num_layers=1,
            num_heads=4,
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def embed(text_encoder, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens `[N, 16]` → `[N, 16, width]`, zero behind the end of a caption, as the pipeline makes them."""
    mask = tokens.ne(text_encoder.config.pad_token_id)
    return text_encoder(tokens, mask).last_hidden_state * mask[..., None]


# ------------------------------------------------------------------------------------------- transformer, schedule


def build_transformer(heads: int = 3, layers: int = 6, text_width: int = TEXT_WIDTH):
    """`WanTransformer3DModel` on single latents; 64 channels a head. It starts by predicting zero."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=heads,
        attention_head_dim=64,
        in_channels=LATENTS,
        out_channels=LATENTS,
        text_dim=text_width,
        freq_dim=128,
        ffn_dim=3 * 64 * heads,
        num_layers=layers,
        cross_attn_norm=True,
    )
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


class Positions(nn.Module):
    """In the place of the transformer's rotary embedding while it trains on parts of a clip, or on a smaller picture.

    Attributes:
        frames, rows, columns: Positions of the latents along each axis, as numbers of latents in the whole clip at its
            native side; they need not be whole.
    """

    def __init__(self, transformer):
        super().__init__()
        rope = transformer.rope
        self.widths = (rope.t_dim, rope.h_dim, rope.w_dim)
        self.frames = self.rows = self.columns = torch.zeros(1)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from diffusers.models.embeddings import get_1d_rotary_pos_embed

        axes = (self.frames, self.rows, self.columns)
        shape = [len(axis) for axis in axes]
        cosines, sines = [], []
        for index, (axis, width) in enumerate(zip(axes, self.widths, strict=True)):
            both = get_1d_rotary_pos_embed(width, axis, use_real=True, repeat_interleave_real=True)
            for parts, values in zip((cosines, sines), both, strict=True):
                view = [1, 1, 1, width]
                view[index] = len(axis)
                parts.append(values.view(view).expand(*shape, width))
        return tuple(torch.cat(parts, -1).flatten(0, 2)[None, :, None] for parts in (cosines, sines))


def spread(count: int, native: int) -> torch.Tensor:
    """Positions of `count` latents that cover the same length as `native` ones."""
    return (torch.arange(count) + 0.5) * (native / count) - 0.5


def build_scheduler():
    """Rectified flow; its steps are denser at high noise (a shift of 3, as Wan 2.1 at 480p)."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def build_pipeline(transformer, text_encoder, tokenizer, autoencoder):
    """The stock pipeline around the parts."""
    from diffusers import WanPipeline

    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=autoencoder,
        scheduler=build_scheduler(),
        transformer=transformer,
    )
