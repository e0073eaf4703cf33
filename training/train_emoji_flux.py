"""Trains the bundled model `emoji-flux`: renders, trains, resumes, exports and evaluates.

    python -m attnswap.training.train_emoji_flux train    --work DIR --minutes 70      # run again to resume
    python -m attnswap.training.train_emoji_flux export   --work DIR --out FOLDER
    python -m attnswap.training.train_emoji_flux evaluate --out FOLDER

Transformer and both text encoders are trained as one, by rectified flow (arXiv 2209.03003); the autoencoder is the
bundled `emoji-sd`'s. The first part of a run draws at half the native side: a quarter of the image tokens, spread over
the native grid by their rotary positions, so that what is drawn is learnt before how.

Data as for `emoji-sd`: Noto Color Emoji, names from the PyPI package `emoji`. Training needs torch 2.9 or newer, for
`torch.optim.Muon`; export and evaluation do not.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..pipelines.emoji_reference import Reference, Score, caption, judge, sample_captions
from ..pipelines.load import BUNDLED
from . import emoji_flux_models as models
from .emoji import render_reference
from .emoji_loop import Schedule, draw_timesteps, load_checkpoint, save_checkpoint, update_average
from .emoji_models import LATENT_SCALE, as_pictures, build_text_encoder, build_tokenizer

NATIVE = 128
TOKEN = 8  # pixels a side: 4× autoencoder, 2×2 patches
DROP_CAPTION = 0.05
CLIP_GRADIENT = 1.0
TIMESTEPS = 1000


def load_autoencoder():
    """`emoji-sd`'s: its encoder is a closed form, its decoder was trained at 1×, 2× and 4× of 64 px."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny.from_pretrained(BUNDLED / "emoji-sd" / "vae", local_files_only=True)


class Data:
    """All (subject, colour) pictures of one side as packed latents, and all captions as tokens, in memory."""

    def __init__(self, work: Path, side: int, subjects: int | None):
        self.reference: Reference = render_reference(side, subjects)
        pairs = [
            (index, colour) for index in range(len(self.reference.names)) for colour in (None, *self.reference.colours)
        ]
        autoencoder = load_autoencoder()
        latents = []
        with torch.no_grad():
            for pair in pairs:
                picture = torch.tensor(self.reference.compose(*pair)).permute(2, 0, 1)[None]
                latents.append(autoencoder.encode(picture * 2 - 1).latents * LATENT_SCALE)
        self.latents = models.pack(torch.cat(latents))
        self.channels = autoencoder.config.latent_channels
        captions = [caption(self.reference.names[subject], colour) for subject, colour in pairs]
        self.tokenizers = build_tokenizer(captions, work / "tokenizer"), models.build_t5_tokenizer(captions)
        self.tokens = self.tokenize(captions)
        self.no_tokens = self.tokenize([""])

    @property
    def image_ids(self) -> torch.Tensor:
        return models.image_ids(self.reference.side // TOKEN, NATIVE // TOKEN)

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        """`[N, 2, 16]`: for CLIP and for T5."""
        options = {"padding": "max_length", "truncation": True, "max_length": models.TEXT_LENGTH}
        return torch.stack([torch.tensor(one(captions, **options).input_ids) for one in self.tokenizers], 1)


class Denoiser(nn.Module):
    """Transformer and text encoders, trained as one."""

    def __init__(self, tokenizers, channels: int):
        super().__init__()
        clip, t5 = tokenizers
        self.transformer = models.build_transformer(channels)
        self.text_encoder = build_text_encoder(clip, models.TEXT_WIDTH)
        self.text_encoder_2 = models.build_t5(t5)

    def forward(
        self, noisy: torch.Tensor, sigmas: torch.Tensor, tokens: torch.Tensor, image_ids: torch.Tensor
    ) -> torch.Tensor:
        clip, t5 = tokens.unbind(1)
        return self.transformer(
            hidden_states=noisy,
            timestep=sigmas,
            pooled_projections=self.text_encoder(clip).pooler_output,
            encoder_hidden_states=self.text_encoder_2(t5)[0],
            txt_ids=image_ids.new_zeros(t5.shape[1], 3),
            img_ids=image_ids,
            return_dict=False,
        )[0]


class MuonAndAdamW:
    """Muon for the matrices inside blocks, AdamW for all else, with the interface of one optimizer.

    Muon's steps are scaled to the size of AdamW's (arXiv 2502.16982), so both take one learning rate.
    """

    def __init__(self, model: nn.Module, weight_decay: float = 0.01):
        named = dict(model.named_parameters())
        inside = [p for name, p in named.items() if p.ndim == 2 and ("block" in name or ".layers." in name)]
        chosen = {id(p) for p in inside}
        self.muon = torch.optim.Muon(inside, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(
            [p for p in named.values() if id(p) not in chosen],
            betas=(0.9, 0.99),
            weight_decay=weight_decay,
            fused=True,
        )
        self.muon.state = self.state = self.adamw.state  # by parameter, and no parameter is in both
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    def step(self) -> None:
        self.muon.step()
        self.adamw.step()

    def zero_grad(self) -> None:
        self.muon.zero_grad()
        self.adamw.zero_grad()


def loss_of_batch(model: Denoiser, data: Data, count: int, bias: float, dtype: torch.dtype) -> torch.Tensor:
    """Squared error of the predicted velocity on random pictures, noise levels and noise; some captions dropped."""
    chosen = torch.randint(len(data.latents), (count,))
    clean = data.latents[chosen]
    noise = torch.randn_like(clean)
    sigmas = (draw_timesteps(count, TIMESTEPS, bias, "cpu") + 1) / TIMESTEPS
    level = sigmas[:, None, None]
    dropped = torch.rand(count, 1, 1) < DROP_CAPTION
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        predicted = model(
            level * noise + (1 - level) * clean,
            sigmas,
            torch.where(dropped, data.no_tokens, data.tokens[chosen]),
            data.image_ids,
        )
    return nn.functional.mse_loss(predicted.float(), noise - clean)


@torch.no_grad()
def preview(data: Data, average: Denoiser, path: Path, dtype: torch.dtype, count: int = 60, steps: int = 12) -> Score:
    """Samples fixed captions at the side of `data`, writes a sheet, returns the score."""
    from .emoji_export import contact_sheet

    asked = sample_captions(data.reference, min(count, len(data.latents)))
    tokens = data.tokenize([caption(data.reference.names[subject], colour) for subject, colour in asked])
    scheduler = models.build_scheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=scheduler.config.base_shift)
    latents = torch.randn(len(asked), *data.latents.shape[1:], generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            velocity = average(latents, timestep.expand(len(asked)) / TIMESTEPS, tokens, data.image_ids)
        latents = scheduler.step(velocity.float(), timestep, latents, return_dict=False)[0]
    decoded = load_autoencoder().decode(models.unpack(latents) / LATENT_SCALE).sample
    pictures = as_pictures((decoded / 2 + 0.5).clamp(0, 1))
    contact_sheet(pictures).save(path)
    return judge(pictures, asked, data.reference)


@contextmanager
def plain_attention() -> Iterator[None]:
    """At these lengths, in bfloat16 on a CPU, attention in plain products takes about half the fused kernel's time."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # counts on a CPU too
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


@plain_attention()
def train(arguments: argparse.Namespace) -> None:
    work, dtype = Path(arguments.work), getattr(torch, arguments.dtype)
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    half, native = (Data(work, side, arguments.subjects) for side in (NATIVE // 2, NATIVE))
    model = Denoiser(native.tokenizers, native.channels)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = MuonAndAdamW(model)
    checkpoint = work / "transformer.safetensors"
    facts = {"step": 0, "seconds": 0.0, "images": {"half": 0, "native": 0}}
    if checkpoint.exists():
        facts = load_checkpoint(checkpoint, model, average, optimizer)
        torch.manual_seed(arguments.seed + facts["step"])
    schedule = Schedule(arguments.steps, arguments.minutes, arguments.rate, arguments.warm_up)
    losses: list[torch.Tensor] = []
    saved = sampled = facts["seconds"]
    began = time.monotonic() - facts["seconds"]
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(native.latents)} pictures, "
        f"from step {facts['step']}",
        flush=True,
    )

    def note(**row) -> None:
        row = {"step": facts["step"], "seconds": round(facts["seconds"]), **facts["images"], **row}
        print(row, flush=True)
        with (work / "transformer.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")

    while (progress := schedule.progress(facts["step"], facts["seconds"])) < 1:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(facts["step"], progress)
        small = progress < arguments.half_share
        data, batch = (half, 2 * arguments.batch) if small else (native, arguments.batch)
        loss = loss_of_batch(model, data, batch, arguments.bias + (1 - arguments.bias) * progress, dtype)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRADIENT, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, model, facts["step"], arguments.average)
        facts["step"] += 1
        facts["seconds"] = time.monotonic() - began
        facts["images"]["half" if small else "native"] += batch
        losses.append(loss.detach())
        if facts["step"] % 50 == 0:
            note(loss=round(float(torch.stack(losses).mean()), 5), rate=schedule.rate(facts["step"], progress))
            losses.clear()
        if facts["seconds"] - saved > 60 * arguments.save_minutes:
            saved = facts["seconds"]
            save_checkpoint(checkpoint, model, average, optimizer, facts)
        if facts["seconds"] - sampled > 60 * arguments.sample_minutes:
            sampled = facts["seconds"]
            note(**vars(preview(data, average, work / f"samples-{facts['step']:06d}.png", dtype)))
    save_checkpoint(checkpoint, model, average, optimizer, facts)
    note(**vars(preview(native, average, work / "samples-last.png", dtype)))


def export(arguments: argparse.Namespace) -> None:
    from .emoji_export import export_pipeline

    work, out = Path(arguments.work), Path(arguments.out)
    data = Data(work, NATIVE, arguments.subjects)
    model = Denoiser(data.tokenizers, data.channels)
    facts = load_checkpoint(work / "transformer.safetensors", None, model)
    clip, t5 = data.tokenizers
    pipe = models.build_pipeline(
        model.transformer, model.text_encoder, clip, model.text_encoder_2, t5, load_autoencoder()
    )
    export_pipeline(
        out,
        pipe,
        data.reference,
        work / "tokenizer",
        arguments.sampling_steps,
        guidance=1.0,  # none, so one call a step
        max_sequence_length=models.TEXT_LENGTH,
        # Above the native size it repeats the subject from where image-to-image leaves it room to.
        routes={"ladder": [0.1]},
    )
    print(f"{out}: step {facts['step']}, {facts['images']}")


def evaluate(arguments: argparse.Namespace) -> None:
    from .emoji_evaluate import evaluate

    print(json.dumps(evaluate(arguments.out), indent=1))


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = root.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--work", required=True, help="folder for checkpoints, logs and sample sheets")
    common.add_argument("--subjects", type=int, help="only the first N subjects")

    run = commands.add_parser("train", parents=[common], help="train transformer and text encoders")
    run.add_argument("--steps", type=int)
    run.add_argument("--minutes", type=float, help="length of the run, earlier parts of a resumed one included")
    run.add_argument("--half-share", type=float, default=0.35, help="part of the run at half the native side")
    run.add_argument("--batch", type=int, default=16, help="pictures a step; twice as many at half the side")
    run.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    run.add_argument("--warm-up", type=int, default=50, help="steps")
    run.add_argument("--bias", type=float, default=0.5, help="noise levels are uniform ** bias; rises to 1 by the end")
    run.add_argument("--average", type=float, default=0.995, help="decay of the weight average")
    run.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--save-minutes", type=float, default=4)
    run.add_argument("--sample-minutes", type=float, default=5)
    run.set_defaults(run=train)

    out = commands.add_parser("export", parents=[common], help="write the pipeline folder")
    out.add_argument("--out", required=True)
    out.add_argument("--sampling-steps", type=int, default=12, help="recorded as the default")
    out.set_defaults(run=export)

    judge_it = commands.add_parser("evaluate", help="measure an exported folder")
    judge_it.add_argument("--out", required=True)
    judge_it.set_defaults(run=evaluate)
    return root


def main() -> None:
    arguments = parser().parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
