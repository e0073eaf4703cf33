"""For all tests: no request leaves the machine, Triton runs without a GPU, and there is a tiny random pipeline."""

from __future__ import annotations

import os

# Read when the libraries are imported, hence before them.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Among two hundred tests that are skipped for want of a GPU, those in a browser must not go unnoticed."""
    skipped = [report for report in terminalreporter.stats.get("skipped", ()) if "test_browser" in report.nodeid]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests of the page are skipped: no Chromium to open it in.")


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random StableDiffusionPipeline of SD 1.5's block structure: 64 px native, 8x autoencoder."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16, 16, 16),
        layers_per_block=2,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_flux(tiny_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random FluxPipeline without embedded guidance: 32 px native, tokens of 4x4 px, 8 of text."""
    import json
    import string

    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(0)
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
            latent_channels=4,
            sample_size=64,
            shift_factor=0.1,
        ),
        text_encoder=CLIPTextModel.from_pretrained(tiny_sd / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(tiny_sd / "tokenizer"),
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=len(pieces), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        tokenizer_2=T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0),
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
        ),
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-flux"
    pipe.save_pretrained(folder)
    preset = {"native_side": 32, "steps": 2, "guidance": 2.0, "max_sequence_length": 8}
    (folder / "attnswap.json").write_text(json.dumps(preset))
    return folder


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random WanPipeline of two transformers: 32x32 px, 9 frames; latents 4x smaller, 2x in time."""
    import json
    import string

    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]

    def transformer() -> WanTransformer3DModel:
        return WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=64,
        )

    pipe = WanPipeline(
        tokenizer=T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(pieces), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        transformer=transformer(),
        transformer_2=transformer(),
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            scale_factor_temporal=2,
            scale_factor_spatial=4,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        boundary_ratio=0.8,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-wan"
    pipe.save_pretrained(folder)
    preset = {"native_side": 32, "frames": 9, "fps": 8, "steps": 2, "guidance": 2.0, "max_sequence_length": 8}
    (folder / "attnswap.json").write_text(json.dumps(preset))
    return folder


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a model folder that a test may damage."""
    import shutil

    return lambda folder: Path(shutil.copytree(folder, tmp_path / f"copy-of-{folder.name}"))


@pytest.fixture
def bundled_fake(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a bundled model that is the tiny one."""
    from attnswap.pipelines import load

    monkeypatch.setattr(load, "BUNDLED", tiny_sd.parent)
    return tiny_sd.name
