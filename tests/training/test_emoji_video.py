"""The parts of the `emoji-video` training: clips, judge, autoencoder, places, loss, sampling, a run in little."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from attnswap.pipelines import load
from attnswap.pipelines.emoji_reference import Reference, psnr
from attnswap.training import emoji, emoji_video_clips, emoji_video_models, train_emoji_video
from attnswap.training.emoji_video_clips import MOTIONS, all_asks, clip_caption, compose, sample_asks
from attnswap.training.emoji_video_judge import judge, motion_of, ranks_of_subjects, turned_by, without_background

OPPOSITE = {
    "moving left": "moving right",
    "moving right": "moving left",
    "moving up": "moving down",
    "moving down": "moving up",
}


@pytest.fixture(scope="module")
def reference() -> Reference:
    whole = Reference.load(load.BUNDLED / "emoji-flux" / "reference")
    chosen = [whole.names.index(name) for name in ("fox", "banana", "penguin")]
    names = tuple(whole.names[index] for index in chosen)
    return Reference(names, whole.sprites[chosen][:, ::2, ::2].copy(), whole.colours)


@pytest.fixture(scope="module")
def clips(reference) -> dict[str, np.ndarray]:
    """A penguin in every motion, 48 px a side."""
    return {motion: compose(reference, (2, motion, "blue"), 48).astype(np.float32) for motion in MOTIONS}


def test_captions_name_subject_motion_and_colour():
    assert clip_caption("fox", "moving left", "green") == "a fox moving left on a green background"
    assert clip_caption("owl", "turning", "orange") == "an owl turning on an orange background"
    assert clip_caption("grapes", "growing", "red") == "grapes growing on a red background"


def test_every_motion_is_asked_for_as_often_and_nothing_twice(reference):
    asks = sample_asks(reference, 60)
    assert len(set(asks)) == 60
    assert [sum(motion == asked for _, asked, _ in asks) for motion in MOTIONS] == [10] * 6
    assert asks == sample_asks(reference, 60)
    assert asks != sample_asks(reference, 60, seed=1)


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_judge_sees_the_motion_that_was_rendered(clips, motion):
    assert motion_of(clips[motion]) == motion


@pytest.mark.parametrize("motion", OPPOSITE)
def test_a_clip_played_backwards_moves_the_other_way(clips, motion):
    assert motion_of(clips[motion][::-1]) == OPPOSITE[motion]


def test_neither_shrinking_nor_standing_still_nor_nothing_is_a_motion(clips):
    assert motion_of(clips["growing"][::-1]) is None
    assert motion_of(np.repeat(clips["turning"][:1], 17, 0)) is None
    assert motion_of(np.ones((17, 48, 48, 3))) is None


def test_a_turn_the_other_way_is_no_turning(clips):
    """Counter-clockwise the middle frame is at 270 degrees."""
    assert motion_of(clips["turning"][:, :, ::-1][:, ::-1][::-1]) != "turning"


def test_angles_are_measured_clockwise(clips):
    frames = without_background(clips["turning"])
    assert [turned_by(frames[0], frames[index]) for index in (0, 4, 8, 16)] == [0, 45, 90, 180]


def test_the_judge_finds_a_subject_wherever_it_is(reference, clips):
    for motion, clip in clips.items():
        for moved in (clip, np.roll(clip, (3, -2), (1, 2))):
            ranks = [ranks_of_subjects(moved[None], [(s, motion, "blue")], reference)[0] for s in range(3)]
            assert ranks[2] == 0
            assert sorted(ranks) == [0, 1, 2]


def test_perfect_clips_score_one_and_swapped_ones_do_not(reference, clips):
    asks = [(2, motion, "blue") for motion in MOTIONS]
    score = judge(np.stack(list(clips.values())), asks, reference)
    assert (score.nearest, score.motion, score.colour, score.count) == (1, 1, 1, 6)
    wrong = [(0, motion, "red") for motion in MOTIONS[1:] + MOTIONS[:1]]
    score = judge(np.stack(list(clips.values())), wrong, reference)
    assert (score.nearest, score.motion, score.colour) == (0, 0, 0)


@pytest.fixture(scope="module")
def components(reference) -> emoji_video_models.Components:
    seen = emoji_video_models.Covariances()
    for motion in MOTIONS:
        seen.add(train_emoji_video.as_tensor(compose(reference, (2, motion, "blue"), 48)))
        seen.add(train_emoji_video.as_tensor(compose(reference, (0, motion, "green"), 48)))
    return seen.components()


@pytest.fixture(scope="module")
def encoded(clips, components):
    """Clips and their latents."""
    batch = torch.stack([train_emoji_video.as_tensor(clip) for clip in clips.values()]).transpose(1, 2)
    autoencoder = emoji_video_models.build_autoencoder(components, 8)
    with torch.no_grad():
        return batch, emoji_video_models.encode(autoencoder, batch)


def test_the_stock_encoder_computes_the_closed_form(encoded, components):
    batch, latents = encoded
    patches = emoji_video_models.patches_of(batch.transpose(1, 2))
    shared = torch.cat([patches[:, :1], (patches[:, 1::2] + patches[:, 2::2]) / 2], 1)
    change = torch.cat([0 * patches[:, :1], (patches[:, 2::2] - patches[:, 1::2]) / 2], 1) @ components.still.T
    wanted = torch.cat([(shared - components.mean) @ components.still.T, change @ components.change.T], -1)
    assert latents.shape == (6, 32, 9, 6, 6)
    # The last normalisation still sees a little of the latents beside its large constant.
    assert (latents.movedim(1, -1) - wanted).norm() < 0.01 * wanted.norm()


def test_the_closed_form_decoder_undoes_it(encoded, components):
    batch, latents = encoded
    assert psnr(emoji_video_models.linear_decode(latents, components).numpy() / 2, batch.numpy() / 2) > 26


def test_a_caption_has_one_clip_in_the_middle_of_the_picture(tmp_path, reference, components):
    """Tokens know places only relative to each other, so nothing could say where another clip would be."""
    autoencoder = emoji_video_models.build_autoencoder(components, 8)
    one = Reference(reference.names[2:], reference.sprites[2:], reference.colours)
    clips = train_emoji_video.Clips(one, autoencoder, 48, tmp_path / "latents.safetensors")
    asked = all_asks(one).index((0, "moving left", "blue"))
    frames = torch.tensor([0, 3, 8])
    clip = train_emoji_video.as_tensor(compose(one, (0, "moving left", "blue"), 48))[None].transpose(1, 2)
    with torch.no_grad():
        wanted = emoji_video_models.encode(autoencoder, clip)[:, :, frames]
    drawn = clips.draw(torch.tensor([asked, asked]), frames)
    torch.testing.assert_close(drawn, wanted.expand(2, -1, -1, -1, -1), atol=0.01, rtol=0)  # kept in half precision


def test_native_positions_are_the_transformers_own():
    transformer = emoji_video_models.build_transformer(1, 1)
    positions = emoji_video_models.Positions(transformer)
    positions.frames = torch.tensor([0.0, 4, 8])
    positions.rows, positions.columns = emoji_video_models.spread(12, 12), emoji_video_models.spread(6, 6)
    own = transformer.rope(torch.zeros(1, 32, 9, 12, 6))
    for mine, stock in zip(positions(torch.zeros(())), own, strict=True):
        chosen = stock.unflatten(1, (9, 72))[:, [0, 4, 8]].flatten(1, 2)
        torch.testing.assert_close(mine, chosen, atol=1e-6, rtol=0)


def test_a_latent_at_half_the_side_sits_in_the_middle_of_its_two():
    assert emoji_video_models.spread(6, 12).tolist() == [0.5, 2.5, 4.5, 6.5, 8.5, 10.5]


def test_text_is_embedded_as_the_pipeline_does():
    tokenizer = train_emoji_video.build_t5_tokenizer(["a fox turning"])
    encoder = emoji_video_models.build_text_encoder(tokenizer, 32).eval()
    pipe = emoji_video_models.build_pipeline(
        emoji_video_models.build_transformer(1, 1), encoder, tokenizer, emoji_video_models.build_autoencoder(PLAIN, 8)
    )
    with torch.no_grad():
        stock = pipe.encode_prompt(["a fox turning", "a fox"], max_sequence_length=8)[0]
        tokens = torch.tensor(tokenizer(["a fox turning", "a fox"], padding="max_length", max_length=8).input_ids)
        torch.testing.assert_close(emoji_video_models.embed(encoder, tokens), stock)


PLAIN = emoji_video_models.Components(torch.zeros(192), torch.zeros(24, 192), torch.zeros(8, 24))


class OneClip:
    """In place of `Data`."""

    def __init__(self, latents: torch.Tensor, reference=None, components=None):
        self.latents, self.reference, self.components = latents, reference, components
        self.tokens = self.no_tokens = torch.zeros(1, 16, dtype=torch.long)
        self.clips = {train_emoji_video.NATIVE: self}

    def draw(self, chosen, frames):
        return self.latents[:, :, frames].expand(len(chosen), -1, -1, -1, -1)

    def perfect(self, noisy, sigmas, tokens, frames):
        """The velocity of who knows the clip."""
        return (noisy - self.latents[:, :, frames]) / sigmas[:, None, None, None, None]


@pytest.mark.parametrize("stage", train_emoji_video.stages()[2:], ids=lambda stage: stage.name)
def test_who_knows_the_clip_has_no_loss(stage):
    torch.manual_seed(0)
    data = OneClip(torch.randn(1, 32, 9, 4, 4))
    loss = train_emoji_video.loss_of_batch(data.perfect, data, stage, torch.float32)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    blind = train_emoji_video.loss_of_batch(lambda noisy, *rest: 0 * noisy, data, stage, torch.float32)
    assert blind.item() > 1


def test_who_knows_the_clip_draws_it(tmp_path, reference, components, monkeypatch):
    ask = (2, "moving left", "blue")
    clip = train_emoji_video.as_tensor(compose(reference, ask, 48))[None].transpose(1, 2)
    with torch.no_grad():
        latents = emoji_video_models.encode(emoji_video_models.build_autoencoder(components, 8), clip)
    data = OneClip(latents, reference, components)
    monkeypatch.setattr(train_emoji_video, "sample_asks", lambda *rest: [ask])
    monkeypatch.setattr(train_emoji_video, "all_asks", lambda *rest: [ask])
    score = train_emoji_video.preview(data, data.perfect, 48, tmp_path / "sheet.png", torch.float32, steps=2)
    assert (score.nearest, score.motion, score.colour, score.count) == (1, 1, 1, 1)


def test_the_stages_follow_one_another():
    plan = train_emoji_video.stages()
    assert [stage.until for stage in plan] == sorted(stage.until for stage in plan)
    assert plan[-1].until == 1
    assert [(stage.side, stage.frames) for stage in plan] == [(48, 5), (48, 9), (96, 3), (96, 9)]
    chosen = plan[0].choose_frames().tolist()
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(9))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9, for torch.optim.Muon")
@pytest.mark.skipif(not Path(emoji.FONT).exists(), reason="needs Debian's fonts-noto-color-emoji")
def test_the_whole_road_in_little(tmp_path, monkeypatch):
    """Train in every stage, resume, train the decoder, export, load with the stock class, evaluate."""
    pytest.importorskip("emoji")
    from attnswap.pipelines import presets
    from attnswap.training.emoji_video_evaluate import evaluate

    build, autoencoder = emoji_video_models.build_transformer, emoji_video_models.build_autoencoder
    monkeypatch.setattr(emoji_video_models, "build_transformer", lambda: build(1, 1))
    monkeypatch.setattr(emoji_video_models, "build_autoencoder", lambda components: autoencoder(components, 8))
    monkeypatch.setattr(emoji_video_clips, "MOTIONS", MOTIONS[:2])
    monkeypatch.setattr(train_emoji_video, "NATIVE", 48)
    monkeypatch.setattr(train_emoji_video, "preview", lambda *rest: argparse.Namespace(nearest=0.0))
    work, out = tmp_path / "work", tmp_path / "out"
    run = train_emoji_video.parser().parse_args
    little = ["--work", str(work), "--subjects", "1"]
    for steps in ("2", "5"):
        arguments = run(["train", *little, "--steps", steps])
        arguments.run(arguments)
    last = json.loads((work / "transformer.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["half"], last["halfwhole"], last["part"], last["whole"]) == (5, 16, 9, 14, 3)
    arguments = run(["decoder", *little, "--minutes", "0.001", "--batch", "1"])
    arguments.run(arguments)
    arguments = run(["export", *little, "--out", str(out), "--sampling-steps", "2"])
    arguments.run(arguments)
    result = evaluate(out, count=2)
    assert (result["count"], result["steps"]) == (2, 2)
    assert 0 <= result["nearest"] <= 1
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "WanPipeline"
    assert presets.read(out).max_sequence_length == 16
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
