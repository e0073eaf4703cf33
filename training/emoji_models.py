"""Builds the untrained parts of `emoji-sd`: autoencoder, tokenizer, text encoder, U-Net, scheduler, pipeline.

All are stock Diffusers and Transformers classes. The autoencoder's encoder is not trained at all: it is the principal
component analysis (PCA) of 4×4 patches, written into `AutoencoderTiny`'s convolutions, so latents exist at once.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

PATCH = 4
TEXT_LENGTH = 16
LATENT_SCALE = 3.0  # `scaling_factor`: the decoder squashes |latent| near 3, so it sees a third of what the U-Net sees
CONTROL_TOKENS = ("<|startoftext|>", "<|endoftext|>")


# ---------------------------------------------------------------------------------------------------- autoencoder


def patches_of(pictures: torch.Tensor) -> torch.Tensor:
    """`[N, 3, H, W]` → `[N·H/4·W/4, 48]`, channel-major as `pixel_unshuffle` has it."""
    return nn.functional.pixel_unshuffle(pictures, PATCH).permute(0, 2, 3, 1).reshape(-1, 3 * PATCH * PATCH)


def patch_components(pictures: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Closed-form optimum of a linear autoencoder on pictures in 0..1.

    Returns the mean patch `[48]`, the analysis rows `[channels, 48]` and the synthesis columns `[48, channels]`.
    The channels are half whitened (divided by the square root of their deviation): the coarse channels, which decide
    what is seen, stay the loudest in the diffusion loss, the fine ones stay audible. Mean square over all is 1.
    """
    patches = patches_of(pictures.double())
    mean = patches.mean(0)
    covariance = (patches - mean).T @ (patches - mean) / len(patches)
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0)[:channels], vectors.flip(1)[:, :channels]
    gain = values.pow(-0.25)
    gain = gain / (gain.square() * values).mean().sqrt()
    return mean.float(), (vectors * gain).T.float(), (vectors / gain).float()


def encoder_weights(encoder: nn.Module, mean: torch.Tensor, analysis: torch.Tensor) -> None:
    """Write the patch analysis into `EncoderTiny`: copy, space-to-depth twice, project.

    A stride-2 convolution with padding 1 sees pixels 2i−1, 2i, 2i+1; taps 1 and 2 are the 2×2 block. Channel order
    after two halvings is (fine row, fine column, coarse row, coarse column, colour).
    """
    copy, first, second, project = (layer for layer in encoder.layers if isinstance(layer, nn.Conv2d))
    for parameter in encoder.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        for colour in range(3):
            copy.weight[colour, colour, 1, 1] = 1
        for convolution, width in ((first, 3), (second, 12)):
            for row in range(2):
                for column in range(2):
                    for channel in range(width):
                        convolution.weight[(row * 2 + column) * width + channel, channel, 1 + row, 1 + column] = 1
        # `second`'s block is the coarse position (block of 2 pixels), `first`'s the fine one inside it.
        order = [
            colour * 16 + (2 * coarse_row + row) * 4 + 2 * coarse_column + column
            for coarse_row in range(2)
            for coarse_column in range(2)
            for row in range(2)
            for column in range(2)
            for colour in range(3)
        ]
        project.weight[:, :, 1, 1] = analysis[:, order] / LATENT_SCALE
        project.bias.copy_(-(analysis @ mean) / LATENT_SCALE)


def build_autoencoder(mean: torch.Tensor, analysis: torch.Tensor, width: int = 24, blocks=(4, 2, 1)):
    """An `AutoencoderTiny` (4× smaller latents) with the closed-form encoder and an untrained decoder."""
    from diffusers import AutoencoderTiny

    model = AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48),
        num_encoder_blocks=(0, 0, 0),
        decoder_block_out_channels=(width,) * 3,
        num_decoder_blocks=tuple(blocks),
        latent_channels=len(analysis),
        scaling_factor=LATENT_SCALE,
    )
    encoder_weights(model.encoder, mean, analysis)
    model.encoder.requires_grad_(False)
    return model


def linear_decode(latents: torch.Tensor, mean: torch.Tensor, synthesis: torch.Tensor) -> torch.Tensor:
    """The closed-form decoder on the U-Net's latents; good enough to watch training by. Pictures in 0..1."""
    patches = torch.einsum("pc,nchw->nphw", synthesis, latents) + mean[:, None, None]
    return nn.functional.pixel_shuffle(patches, PATCH).clamp(0, 1)


# ------------------------------------------------------------------------------------------------------------ text


def build_tokenizer(captions: list[str], folder: Path):
    """A `CLIPTokenizer` in which every caption word is one token and any other text still has one (bytes).

    Byte-pair merges are learned on the words until none is split, then written in CLIP's own file format.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = sorted({word for caption in captions for word in caption.replace("-", " - ").split()})
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainer = trainers.BpeTrainer(vocab_size=100_000, min_frequency=0, end_of_word_suffix="</w>", show_progress=False)
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trained.train_from_iterator(words, trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), *CONTROL_TOKENS]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in merges) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TEXT_LENGTH,
        "bos_token": CONTROL_TOKENS[0],
        "eos_token": CONTROL_TOKENS[1],
        "pad_token": CONTROL_TOKENS[1],
        "unk_token": CONTROL_TOKENS[1],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def build_text_encoder(tokenizer, width: int = 128):
    """A two-layer `CLIPTextModel`, trained jointly with the U-Net."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


# ----------------------------------------------------------------------------------------------- U-Net and schedule


def build_unet(latent_side: int, channels: int, widths=(48, 64, 96, 128), text_width: int = 128):
    """`UNet2DConditionModel` with SD 1.5's block structure; 16 channels per attention head.

    The caption also enters through the time embedding (`addition_embed_type="text"`): every residual block knows the
    subject from the first step, which this short a training needs.
    """
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=latent_side,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=tuple(widths),
        layers_per_block=2,
        cross_attention_dim=text_width,
        attention_head_dim=tuple(width // 16 for width in widths),
        norm_num_groups=16,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        resnet_time_scale_shift="scale_shift",
    )


def build_scheduler():
    """DDIM, v-prediction, zero terminal signal (Lin et al. 2024), so pure noise really is where sampling starts."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


def build_pipeline(unet, text_encoder, tokenizer, autoencoder):
    """The stock pipeline around the parts."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def as_pictures(tensor: torch.Tensor) -> np.ndarray:
    """`[N, 3, H, W]` in 0..1 → `[N, H, W, 3]` float arrays, as `pipelines/emoji_reference.py` takes them."""
    return tensor.detach().float().cpu().permute(0, 2, 3, 1).numpy()
