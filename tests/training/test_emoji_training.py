"""The parts of the `emoji-sd` training: closed-form encoder, tokenizer, schedule, checkpoints, and a run in little."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from attnswap.training import emoji, emoji_models
from attnswap.training.emoji_loop import (
    Schedule,
    Threads,
    draw_timesteps,
    load_checkpoint,
    save_checkpoint,
    update_average,
)
from torch import nn

CAPTIONS = ["a fox", "a red fox on a blue background", "a two-hump camel", "an owl", "corn or orange"]


def test_encoder_is_the_closed_form():
    torch.manual_seed(0)
    pictures = torch.rand(6, 3, 16, 16)
    mean, analysis, _synthesis = emoji_models.patch_components(pictures, 12)
    model = emoji_models.build_autoencoder(mean, analysis)
    latents = model.encode(pictures * 2 - 1).latents * emoji_models.LATENT_SCALE
    patches = emoji_models.patches_of(pictures)
    expected = ((patches - mean) @ analysis.T).reshape(6, 4, 4, 12).permute(0, 3, 1, 2)
    torch.testing.assert_close(latents, expected, atol=2e-5, rtol=0)
    assert latents.square().mean().item() == pytest.approx(1, abs=1e-3)
    assert model.decode(latents).sample.shape == pictures.shape


def test_all_components_lose_nothing():
    pictures = torch.rand(8, 3, 16, 16)
    mean, analysis, synthesis = emoji_models.patch_components(pictures, 48)
    latents = ((emoji_models.patches_of(pictures) - mean) @ analysis.T).reshape(8, 4, 4, 48).permute(0, 3, 1, 2)
    torch.testing.assert_close(emoji_models.linear_decode(latents, mean, synthesis), pictures, atol=1e-4, rtol=0)


def test_every_caption_word_is_one_token_and_nothing_is_unknown(tmp_path):
    from transformers import CLIPTokenizer

    tokenizer = emoji_models.build_tokenizer(CAPTIONS, tmp_path)
    for word in {word for text in CAPTIONS for word in text.replace("-", " - ").split()}:
        assert len(tokenizer(word).input_ids) == 3, word
    again = CLIPTokenizer.from_pretrained(tmp_path)
    odd = "Größe 日本 x9!?"
    assert again(odd).input_ids == tokenizer(odd).input_ids
    assert tokenizer.unk_token_id not in tokenizer(odd, add_special_tokens=False).input_ids
    assert again.model_max_length == emoji_models.TEXT_LENGTH


def test_schedule_by_steps_minutes_and_both():
    assert Schedule(100, None, 1e-3).progress(50, 1e9) == 0.5
    assert Schedule(None, 10, 1e-3).progress(10**9, 300) == 0.5
    assert Schedule(100, 10, 1e-3).progress(20, 300) == 0.5
    schedule = Schedule(1000, None, 1e-3, warm_up=10)
    rates = [schedule.rate(step, step / 1000) for step in range(1001)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == pytest.approx(1e-3, rel=0.01)
    assert rates[-1] == pytest.approx(1e-5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    with pytest.raises(ValueError, match="length of the run"):
        Schedule(None, None, 1e-3)


def test_timesteps_cover_the_range_and_favour_noise():
    torch.manual_seed(0)
    drawn = draw_timesteps(4000, 1000, 0.5, "cpu")
    assert drawn.min() >= 0
    assert drawn.max() == 999
    assert (drawn >= 500).float().mean().item() == pytest.approx(0.75, abs=0.01)


def test_average_follows_the_weights():
    model, average = nn.Linear(2, 2), nn.Linear(2, 2)
    for step in range(300):
        update_average(average, model, step, 0.9)
    torch.testing.assert_close(average.weight, model.weight)


def test_thread_trials_end_with_one_of_the_choices():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        threads = Threads(torch.device("cpu"), trial_steps=2)
        for _ in range(20):
            threads.step()
        assert torch.get_num_threads() in (1, 2)
        assert threads.next_trial is not None
    finally:
        torch.set_num_threads(before)


def train_a_little(model, optimizer, steps):
    for step in range(steps):
        pictures = torch.arange(108.0).reshape(1, 3, 6, 6).div(50).sub(step)
        model(pictures).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_resumed_run_is_the_run(tmp_path):
    def fresh():
        torch.manual_seed(0)
        model = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        return model, nn.Conv2d(3, 5, 3), torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    straight, average, optimizer = fresh()
    train_a_little(straight, optimizer, 3)
    save_checkpoint(tmp_path / "c.safetensors", straight, average, optimizer, {"step": 3})
    train_a_little(straight, optimizer, 3)

    resumed, other, optimizer = fresh()
    assert load_checkpoint(tmp_path / "c.safetensors", resumed, other, optimizer) == {"step": 3}
    train_a_little(resumed, optimizer, 3)
    assert torch.equal(straight.weight, resumed.weight)
    assert torch.equal(average.weight, other.weight)


needs_font = pytest.mark.skipif(not Path(emoji.FONT).exists(), reason="needs Debian's fonts-noto-color-emoji")


@needs_font
def test_subjects_are_distinct_centred_and_drawn():
    pytest.importorskip("emoji")
    reference = emoji.render_reference(32)
    assert len(set(reference.names)) == len(reference.names) >= 100
    assert "fox" in reference.names
    alpha = reference.sprites[..., 3].astype(float)
    assert (alpha.mean((1, 2)) > 20).all()
    assert not alpha[:, 0].any()
    assert not alpha[:, :, -1].any()
    flat = reference.all_on("red").reshape(len(reference.names), -1)
    distance = np.square(flat[:, None] - flat[None]).mean(-1) + np.eye(len(flat))
    assert distance.min() > 0.003


@needs_font
def test_the_whole_road_in_little(tmp_path, monkeypatch):
    """Train, resume, decode, export, load with the stock class, evaluate."""
    pytest.importorskip("emoji")
    from attnswap.training import emoji_models, train_emoji_sd
    from attnswap.training.emoji_evaluate import evaluate

    build = emoji_models.build_unet
    monkeypatch.setattr(emoji_models, "build_unet", lambda side, channels: build(side, channels, (16, 16, 16, 16)))
    monkeypatch.setattr(train_emoji_sd, "preview", lambda *args, **kwargs: argparse.Namespace(nearest=0.0))
    work, out = tmp_path / "work", tmp_path / "out"
    run = train_emoji_sd.parser().parse_args
    for steps in ("2", "3"):
        arguments = run(["unet", "--work", str(work), "--subjects", "5", "--steps", steps, "--batch", "2"])
        arguments.run(arguments)
    arguments = run(["decoder", "--work", str(work), "--subjects", "5", "--minutes", "0.01", "--batch", "2"])
    arguments.run(arguments)
    arguments = run(["export", "--work", str(work), "--subjects", "5", "--out", str(out), "--sampling-steps", "2"])
    arguments.run(arguments)
    result = evaluate(out, count=4)
    assert result["count"] == 4
    assert result["steps"] == 2
    assert 0 <= result["nearest"] <= 1
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
