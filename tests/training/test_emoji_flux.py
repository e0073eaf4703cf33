"""The parts of the `emoji-flux` training: tokenizer, positions, optimizer, loss, sampling, and a run in little."""

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from attnswap.pipelines.emoji_reference import sample_captions
from attnswap.training import emoji, emoji_flux_models, train_emoji_flux
from attnswap.training.emoji_loop import load_checkpoint, save_checkpoint
from attnswap.training.train_emoji_flux import MuonAndAdamW
from torch import nn

CAPTIONS = ["a fox", "a red fox on a blue background", "a two-hump camel", "an owl", "corn or orange"]


def test_latents_are_packed_as_the_pipeline_packs_them():
    from diffusers import FluxPipeline

    latents = torch.randn(2, 12, 8, 8)
    packed = emoji_flux_models.pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 12, 8, 8))
    assert torch.equal(emoji_flux_models.unpack(packed), latents)


def test_native_positions_are_the_pipelines_own():
    from diffusers import FluxPipeline

    own = FluxPipeline._prepare_latent_image_ids(1, 16, 16, "cpu", torch.float32)
    assert torch.equal(emoji_flux_models.image_ids(16, 16), own)


def test_a_token_at_half_the_side_sits_in_the_middle_of_its_four():
    native = emoji_flux_models.image_ids(16, 16).reshape(16, 16, 3)
    half = emoji_flux_models.image_ids(8, 16).reshape(8, 8, 3)
    four = native.reshape(8, 2, 8, 2, 3).mean((1, 3))
    assert torch.equal(half, four)


def test_every_caption_word_is_one_piece_and_other_words_fall_into_letters(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = emoji_flux_models.build_t5_tokenizer(CAPTIONS)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert type(again) is type(tokenizer)
    assert again.model_max_length == emoji_flux_models.TEXT_LENGTH
    assert not list(tmp_path.glob("*.model"))
    for text in (*CAPTIONS, "An X-ray, 9!"):
        assert again(text).input_ids == tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in again(text).input_ids
    for text in CAPTIONS:
        assert len(again(text).input_ids) == len(text.split()) + 1, text


def test_native_size_is_shifted_as_flux_is_at_its_smallest():
    scheduler = emoji_flux_models.build_scheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=scheduler.config.base_shift)
    shift = math.exp(0.5)
    assert scheduler.sigmas.tolist() == pytest.approx([1, shift / (shift + 1), 0])


class TinyDenoiser(nn.Module):
    """A parameter of each kind: a matrix in a block, an embedding, a bias."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(3, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = hidden + block(hidden).tanh()
        return hidden


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9, for torch.optim.Muon")


@needs_muon
def test_muon_has_the_matrices_in_blocks_and_adamw_the_rest():
    model = TinyDenoiser()
    optimizer = MuonAndAdamW(model)
    muon, adamw = ({id(p) for p in part.param_groups[0]["params"]} for part in (optimizer.muon, optimizer.adamw))
    assert muon == {id(block.weight) for block in model.blocks}
    assert muon | adamw == {id(p) for p in model.parameters()}
    assert not muon & adamw


@needs_muon
def test_a_resumed_run_is_the_run(tmp_path):
    def fresh():
        torch.manual_seed(0)
        model = TinyDenoiser()
        return model, TinyDenoiser(), MuonAndAdamW(model)

    def go(model, optimizer):
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        for _ in range(3):
            model(torch.tensor([0, 1, 2])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    straight, average, optimizer = fresh()
    go(straight, optimizer)
    save_checkpoint(tmp_path / "c.safetensors", straight, average, optimizer, {"step": 3})
    halfway = [p.clone() for p in straight.parameters()]
    go(straight, optimizer)

    resumed, other, optimizer = fresh()
    assert load_checkpoint(tmp_path / "c.safetensors", resumed, other, optimizer) == {"step": 3}
    go(resumed, optimizer)
    for one, two, before in zip(straight.parameters(), resumed.parameters(), halfway, strict=True):
        assert torch.equal(one, two)
        assert not torch.equal(one, before)


class OnePicture:
    """In place of `Data`."""

    def __init__(self, reference=None):
        self.latents = torch.randn(1, 64, 48)
        self.tokens = self.no_tokens = torch.zeros(1, 2, 16, dtype=torch.long)
        self.image_ids = emoji_flux_models.image_ids(8, 16)
        self.reference = reference

    def tokenize(self, captions):
        return self.tokens.expand(len(captions), -1, -1)

    def perfect(self, noisy, sigmas, tokens, image_ids):
        """The velocity of who knows the picture."""
        return (noisy - self.latents) / sigmas[:, None, None]


def test_who_knows_the_picture_has_no_loss():
    torch.manual_seed(0)
    data = OnePicture()
    loss = train_emoji_flux.loss_of_batch(data.perfect, data, 8, 0.5, torch.float32)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    blind = train_emoji_flux.loss_of_batch(lambda noisy, *rest: 0 * noisy, data, 8, 0.5, torch.float32)
    assert blind.item() > 1


needs_font = pytest.mark.skipif(not Path(emoji.FONT).exists(), reason="needs Debian's fonts-noto-color-emoji")


@needs_font
def test_who_knows_the_picture_draws_it(tmp_path):
    pytest.importorskip("emoji")
    real = train_emoji_flux.Data(tmp_path, 64, 1)
    (_, colour), *_ = sample_captions(real.reference, 1)
    data = OnePicture(real.reference)
    data.latents = real.latents[[[None, *real.reference.colours].index(colour)]]
    score = train_emoji_flux.preview(data, data.perfect, tmp_path / "sheet.png", torch.float32, count=1, steps=2)
    assert (score.nearest, score.colour, score.count) == (1, 1, 1)


@needs_muon
@needs_font
def test_the_whole_road_in_little(tmp_path, monkeypatch):
    """Train at half the side and at the native one, resume, export, load with the stock class, evaluate."""
    pytest.importorskip("emoji")
    from attnswap.pipelines import presets
    from attnswap.training.emoji_evaluate import evaluate

    build = emoji_flux_models.build_transformer
    monkeypatch.setattr(emoji_flux_models, "build_transformer", lambda channels: build(channels, 1, 1, 1))
    monkeypatch.setattr(train_emoji_flux, "preview", lambda *args, **kwargs: argparse.Namespace(nearest=0.0))
    work, out = tmp_path / "work", tmp_path / "out"
    run = train_emoji_flux.parser().parse_args
    little = ["--work", str(work), "--subjects", "2"]
    for steps in ("2", "4"):
        arguments = run(["train", *little, "--steps", steps, "--batch", "1", "--half-share", "0.5"])
        arguments.run(arguments)
    last = json.loads((work / "transformer.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["half"], last["native"]) == (4, 2, 3)
    arguments = run(["export", *little, "--out", str(out), "--sampling-steps", "2"])
    arguments.run(arguments)
    result = evaluate(out, count=2)
    assert (result["count"], result["steps"]) == (2, 2)
    assert 0 <= result["nearest"] <= 1
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
    assert presets.read(out).max_sequence_length == emoji_flux_models.TEXT_LENGTH
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert not [path for path in out.rglob("*.json") if str(Path(emoji.__file__).parents[1]) in path.read_text()]
