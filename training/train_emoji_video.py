"""Trains the bundled model `emoji-video`: renders, trains, resumes, exports and evaluates.

    python -m attnswap.training.train_emoji_video train    --work DIR --minutes 60      # run again to resume
    python -m attnswap.training.train_emoji_video decoder  --work DIR --minutes 15
    python -m attnswap.training.train_emoji_video export   --work DIR --out FOLDER
    python -m attnswap.training.train_emoji_video evaluate --out FOLDER

Transformer and text encoder are trained as one, by rectified flow (arXiv 2209.03003), in four stages: at half the
native side first five of the nine latent frames, then all; at the native side first three, then all. Rotary positions
place the latents of all stages in the grid of the last. The autoencoder's encoder is a closed form, so its decoder can
be trained before, beside or after.

A caption has one clip, in the middle of the picture. Wan's tokens know their places only relative to each other: with
every clip moved to a random place, nothing in the caption or the positions says where its subject is, and a run of 53
minutes learnt no motion.

Needs the font, the package `emoji` and, for `torch.optim.Muon`, torch 2.9; evaluation needs none of them.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..pipelines.emoji_reference import Reference
from . import emoji_video_models as models
from .emoji import COLOURS, render, subject_name
from .emoji_flux_models import TEXT_LENGTH, build_t5_tokenizer
from .emoji_loop import Schedule, draw_timesteps, load_checkpoint, save_checkpoint, update_average
from .emoji_video_clips import FRAMES, all_asks, clip_caption, over, sample_asks, sprite_clip
from .emoji_video_judge import Score, contact_sheet, judge
from .train_emoji_flux import MuonAndAdamW, plain_attention

NATIVE = 96
LATENT_FRAMES = (FRAMES - 1) // models.PAIR + 1
# Unlike each other, and unlike themselves when turned.
SUBJECTS = "🦊🍌🌵🍓🐧🍎🌲🐘🍉🌹🦒🍔🐸🍇🥕🍄🐢🐙🦈🍦🐳🌽🦆🐌"
DROP_CAPTION = 0.08
CLIP_GRADIENT = 1.0
TIMESTEPS = 1000
BIAS = 0.35  # noise levels are uniform ** bias: mostly high, where it is decided what is drawn
WARM_UP = 50  # steps
AVERAGE = 0.99  # decay of the weight average


@dataclass(frozen=True)
class Stage:
    """A part of the run.

    Attributes:
        until: Progress at which it ends.
        side: Pixels.
        frames: Latent frames of a clip, anywhere in it.
        batch: Clips a step.
    """

    name: str
    until: float
    side: int
    frames: int
    batch: int

    def choose_frames(self) -> torch.Tensor:
        """Which latent frames a step sees, in order."""
        return torch.randperm(LATENT_FRAMES)[: self.frames].sort().values


def stages() -> tuple[Stage, ...]:
    """Steps take about as long in each; what moves where is learnt at half the side, where a step sees most clips."""
    return (
        Stage("half", 0.3, NATIVE // 2, 5, 16),
        Stage("halfwhole", 0.45, NATIVE // 2, LATENT_FRAMES, 9),
        Stage("part", 0.7, NATIVE, 3, 7),
        Stage("whole", 1.0, NATIVE, LATENT_FRAMES, 3),
    )


def build_reference(subjects: int | None = None) -> Reference:
    characters = SUBJECTS[:subjects]
    sprites = np.stack([render(character, NATIVE) for character in characters])
    return Reference(tuple(subject_name(character) for character in characters), sprites, COLOURS)


def measure(reference: Reference) -> models.Components:
    """The components of every subject in every motion, each on one of the colours."""
    seen = models.Covariances()
    for index, (subject, motion, colour) in enumerate(all_asks(reference)):
        if index % len(reference.colours) == index // len(reference.colours) % len(reference.colours):
            rgba = sprite_clip(reference.sprites[subject], motion, NATIVE)
            seen.add(as_tensor(over(rgba, reference.colours[colour])))
    return seen.components()


def as_tensor(clip: np.ndarray) -> torch.Tensor:
    """`[F, H, W, 3]` in 0..1 → `[F, 3, H, W]` in -1..1."""
    return torch.from_numpy(clip).permute(0, 3, 1, 2).float() * 2 - 1


class Clips:
    """All (subject, motion, colour) clips of one side as latents, in the middle of the picture."""

    def __init__(self, reference: Reference, autoencoder, side: int, cache: Path):
        if not cache.exists():
            save_file({"latents": self.make(reference, autoencoder, side)}, cache)
        self.latents = load_file(cache)["latents"]

    @staticmethod
    @torch.no_grad()
    def make(reference: Reference, autoencoder, side: int) -> torch.Tensor:
        latents = []
        for subject, motion, _ in all_asks(reference)[:: len(reference.colours)]:
            rgba = sprite_clip(reference.sprites[subject], motion, side)
            clips = torch.stack([as_tensor(over(rgba, colour)) for colour in reference.colours.values()])
            latents.append(models.encode(autoencoder, clips.transpose(1, 2)).half())
        return torch.cat(latents)

    def draw(self, chosen: torch.Tensor, frames: torch.Tensor) -> torch.Tensor:
        """The chosen clips' latent frames, `[N, C, L, H, W]`."""
        return self.latents[chosen][:, :, frames].float()


class Data:
    """What is trained on: clips at half the native side and at the native one, captions as tokens."""

    def __init__(self, work: Path, subjects: int | None):
        work.mkdir(parents=True, exist_ok=True)
        self.reference = build_reference(subjects)
        self.components = measure(self.reference)
        self.autoencoder = models.build_autoencoder(self.components)
        names, asks = self.reference.names, all_asks(self.reference)
        captions = [clip_caption(names[subject], motion, colour) for subject, motion, colour in asks]
        self.tokenizer = build_t5_tokenizer(captions)
        self.tokens, self.no_tokens = self.tokenize(captions), self.tokenize([""])
        self.clips = {
            side: Clips(self.reference, self.autoencoder, side, work / f"latents-{side}.safetensors")
            for side in (NATIVE // 2, NATIVE)
        }

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        """`[N, 16]`."""
        options = {"padding": "max_length", "truncation": True, "max_length": TEXT_LENGTH}
        return torch.tensor(self.tokenizer(captions, **options).input_ids)


class Denoiser(nn.Module):
    """Transformer and text encoder, trained as one."""

    def __init__(self, tokenizer):
        super().__init__()
        self.transformer = models.build_transformer()
        self.text_encoder = models.build_text_encoder(tokenizer)
        self.transformer.rope = models.Positions(self.transformer)

    def forward(
        self, noisy: torch.Tensor, sigmas: torch.Tensor, tokens: torch.Tensor, frames: torch.Tensor
    ) -> torch.Tensor:
        """Velocity of `noisy` `[N, C, L, H, W]`; `frames` are the places of its latent frames in the clip."""
        positions = self.transformer.rope
        positions.frames = frames.float()
        positions.rows, positions.columns = (models.spread(n, NATIVE // models.PATCH) for n in noisy.shape[-2:])
        text = models.embed(self.text_encoder, tokens)
        return self.transformer(noisy, sigmas * TIMESTEPS, text, return_dict=False)[0]


def loss_of_batch(model: Denoiser, data: Data, stage: Stage, dtype: torch.dtype) -> torch.Tensor:
    """Squared error of the predicted velocity on random clips, noise levels and noise; some captions dropped."""
    chosen = torch.randint(len(data.tokens), (stage.batch,))
    frames = stage.choose_frames()
    clean = data.clips[stage.side].draw(chosen, frames)
    noise = torch.randn_like(clean)
    sigmas = (draw_timesteps(stage.batch, TIMESTEPS, BIAS, "cpu") + 1) / TIMESTEPS
    level = sigmas[:, None, None, None, None]
    tokens = torch.where(torch.rand(stage.batch, 1) < DROP_CAPTION, data.no_tokens, data.tokens[chosen])
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        predicted = model(level * noise + (1 - level) * clean, sigmas, tokens, frames)
    return nn.functional.mse_loss(predicted.float(), noise - clean)


@torch.no_grad()
def preview(
    data: Data, average: Denoiser, side: int, path: Path, dtype: torch.dtype, count: int = 12, steps: int = 10
) -> Score:
    """Samples whole clips of fixed captions, decoded by the closed form; writes a sheet, returns the score."""
    asks = sample_asks(data.reference, min(count, len(data.tokens)))
    tokens = data.tokens[[all_asks(data.reference).index(ask) for ask in asks]]
    scheduler = models.build_scheduler()
    scheduler.set_timesteps(steps)
    grid = side // models.PATCH
    shape = (len(asks), models.LATENTS, LATENT_FRAMES, grid, grid)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            velocity = average(latents, timestep.expand(len(asks)) / TIMESTEPS, tokens, torch.arange(LATENT_FRAMES))
        latents = scheduler.step(velocity.float(), timestep, latents, return_dict=False)[0]
    clips = models.linear_decode(latents, data.components).permute(0, 2, 3, 4, 1).numpy() / 2 + 0.5
    contact_sheet(clips).save(path)
    return judge(clips, asks, data.reference)


@plain_attention()
def train(arguments: argparse.Namespace) -> None:
    work, dtype = Path(arguments.work), getattr(torch, arguments.dtype)
    torch.manual_seed(arguments.seed)
    data = Data(work, arguments.subjects)
    model = Denoiser(data.tokenizer)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = MuonAndAdamW(model)
    checkpoint = work / "transformer.safetensors"
    plan = stages()
    facts: dict[str, Any] = {"step": 0, "seconds": 0.0, "clips": dict.fromkeys((stage.name for stage in plan), 0)}
    if checkpoint.exists():
        facts = load_checkpoint(checkpoint, model, average, optimizer)
        torch.manual_seed(arguments.seed + facts["step"])
    schedule = Schedule(arguments.steps, arguments.minutes, arguments.rate, WARM_UP)
    losses: list[torch.Tensor] = []
    saved = sampled = facts["seconds"]
    began = time.monotonic() - facts["seconds"]
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{parameters:.2f} M parameters, {len(data.tokens)} clips, from step {facts['step']}", flush=True)

    def note(**row) -> None:
        row = {"step": facts["step"], "seconds": round(facts["seconds"]), **facts["clips"], **row}
        print(row, flush=True)
        with (work / "transformer.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")

    while (progress := schedule.progress(facts["step"], facts["seconds"])) < 1:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(facts["step"], progress)
        stage = next(stage for stage in plan if progress < stage.until)
        loss = loss_of_batch(model, data, stage, dtype)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRADIENT, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, model, facts["step"], AVERAGE)
        facts["step"] += 1
        facts["seconds"] = time.monotonic() - began
        facts["clips"][stage.name] += stage.batch
        losses.append(loss.detach())
        if facts["step"] % 50 == 0:
            note(loss=round(float(torch.stack(losses).mean()), 5), rate=schedule.rate(facts["step"], progress))
            losses.clear()
        if facts["seconds"] - saved > 60 * arguments.save_minutes:
            saved = facts["seconds"]
            save_checkpoint(checkpoint, model, average, optimizer, facts)
        if facts["seconds"] - sampled > 60 * arguments.sample_minutes:
            sampled = facts["seconds"]
            note(**vars(preview(data, average, stage.side, work / f"samples-{facts['step']:06d}.png", dtype)))
    save_checkpoint(checkpoint, model, average, optimizer, facts)
    note(**vars(preview(data, average, NATIVE, work / "samples-last.png", dtype)))


def train_decoder(arguments: argparse.Namespace) -> None:
    from .emoji_video_decoder import train_decoder

    work = Path(arguments.work)
    reference = build_reference(arguments.subjects)
    autoencoder = models.build_autoencoder(measure(reference))
    train_decoder(autoencoder, reference, arguments.minutes, work / "autoencoder.safetensors", arguments.batch)


def export(arguments: argparse.Namespace) -> None:
    from .emoji_video_export import export_pipeline

    work, out = Path(arguments.work), Path(arguments.out)
    data = Data(work, arguments.subjects)
    model = Denoiser(data.tokenizer)
    facts = load_checkpoint(work / "transformer.safetensors", None, model)
    transformer = models.build_transformer()
    transformer.load_state_dict(model.transformer.state_dict())
    data.autoencoder.load_state_dict(load_file(work / "autoencoder.safetensors"))
    pipe = models.build_pipeline(transformer, model.text_encoder, data.tokenizer, data.autoencoder)
    export_pipeline(out, pipe, data.reference, arguments.sampling_steps, arguments.guidance)
    print(f"{out}: step {facts['step']}, {facts['clips']}")


def evaluate(arguments: argparse.Namespace) -> None:
    from .emoji_video_evaluate import evaluate

    print(json.dumps(evaluate(arguments.out, arguments.count), indent=1))


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = root.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--work", required=True, help="folder for checkpoints, logs and sample sheets")
    common.add_argument("--subjects", type=int, help="only the first N subjects")

    run = commands.add_parser("train", parents=[common], help="train transformer and text encoder")
    run.add_argument("--steps", type=int)
    run.add_argument("--minutes", type=float, help="length of the run, earlier parts of a resumed one included")
    run.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    run.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--save-minutes", type=float, default=4)
    run.add_argument("--sample-minutes", type=float, default=6)
    run.set_defaults(run=train)

    decoder = commands.add_parser("decoder", parents=[common], help="train the autoencoder's decoder")
    decoder.add_argument("--minutes", type=float, required=True)
    decoder.add_argument("--batch", type=int, default=4, help="clips of nine frames a step")
    decoder.set_defaults(run=train_decoder)

    out = commands.add_parser("export", parents=[common], help="write the pipeline folder")
    out.add_argument("--out", required=True)
    out.add_argument("--sampling-steps", type=int, default=12, help="recorded as the default")
    out.add_argument("--guidance", type=float, default=2.0, help="recorded as the default")
    out.set_defaults(run=export)

    judge_it = commands.add_parser("evaluate", help="measure an exported folder")
    judge_it.add_argument("--out", required=True)
    judge_it.add_argument("--count", type=int, default=60, help="prompts")
    judge_it.set_defaults(run=evaluate)
    return root


def main() -> None:
    arguments = parser().parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
