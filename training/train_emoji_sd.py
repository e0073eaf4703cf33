"""Trains the bundled model `emoji-sd`: renders, trains, resumes, exports and evaluates.

    python -m attnswap.training.train_emoji_sd unet     --work DIR --minutes 60      # run again to resume
    python -m attnswap.training.train_emoji_sd decoder  --work DIR --minutes 10
    python -m attnswap.training.train_emoji_sd export   --work DIR --out FOLDER
    python -m attnswap.training.train_emoji_sd evaluate --out FOLDER

The two trainings are independent, as the latents come from a closed form (`emoji_models.py`). The same code uses an
accelerator: `--device cuda --dtype bfloat16 --batch 256 --native 128`. Checkpoints are safetensors.

Data: Noto Color Emoji (Debian `fonts-noto-color-emoji`), names from the PyPI package `emoji`; both only to train.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from ..pipelines.emoji_reference import Reference, caption, judge, psnr, sample_captions
from . import emoji_models as models
from .emoji import render_reference
from .emoji_loop import Schedule, Threads, draw_timesteps, load_checkpoint, save_checkpoint, update_average

LATENT_CHANNELS = 12
DROP_CAPTION = 0.1
CLIP_GRADIENT = 1.0


class Data:
    """All (subject, colour) pictures as latents and all captions as tokens, in memory; writes `work/tokenizer`."""

    def __init__(self, work: Path, native: int, subjects: int | None):
        self.reference: Reference = render_reference(native, subjects)
        self.pairs = [
            (index, colour) for index in range(len(self.reference.names)) for colour in (None, *self.reference.colours)
        ]
        pictures = np.stack([self.reference.compose(*pair) for pair in self.pairs])
        self.pictures = torch.tensor(pictures).permute(0, 3, 1, 2).contiguous()
        self.mean, self.analysis, self.synthesis = models.patch_components(self.pictures, LATENT_CHANNELS)
        with torch.no_grad():
            self.latents = self.autoencoder().encode(self.pictures * 2 - 1).latents * models.LATENT_SCALE
        captions = [caption(self.reference.names[subject], colour) for subject, colour in self.pairs]
        self.tokenizer = models.build_tokenizer(captions, work / "tokenizer")
        self.tokens = self.tokenize(captions)
        self.no_tokens = self.tokenize([""])

    def autoencoder(self):
        """Closed-form encoder, decoder not trained."""
        return models.build_autoencoder(self.mean, self.analysis)

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        return self.tokenizer(
            captions, padding="max_length", truncation=True, max_length=models.TEXT_LENGTH, return_tensors="pt"
        ).input_ids


class Denoiser(nn.Module):
    """U-Net and text encoder, trained as one."""

    def __init__(self, tokenizer, native: int):
        super().__init__()
        self.unet = models.build_unet(native // models.PATCH, LATENT_CHANNELS)
        self.text_encoder = models.build_text_encoder(tokenizer)

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        text = self.text_encoder(tokens).last_hidden_state
        return self.unet(noisy, timesteps, text, return_dict=False)[0]


def loss_of_batch(forward, scheduler, latents, tokens, no_tokens, arguments) -> torch.Tensor:
    """Squared error of the predicted velocity on random pictures, timesteps and noise; some captions dropped."""
    device, count = latents.device, arguments.batch
    chosen = torch.randint(len(latents), (count,), device=device)
    clean, noise = latents[chosen], torch.randn(count, *latents.shape[1:], device=device)
    timesteps = draw_timesteps(count, scheduler.config.num_train_timesteps, arguments.bias, device)
    dropped = torch.rand(count, 1, device=device) < DROP_CAPTION
    noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
    dtype = getattr(torch, arguments.dtype)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        predicted = forward(noisy, timesteps, torch.where(dropped, no_tokens, tokens[chosen]))
    return nn.functional.mse_loss(predicted.float(), scheduler.get_velocity(clean, noise, timesteps))


@torch.no_grad()
def preview(data: Data, average: Denoiser, path: Path, count: int = 60, steps: int = 20, guidance: float = 3.0):
    """Samples fixed captions with the stock pipeline, decodes by the closed form, writes a sheet, returns the score."""
    from .emoji_export import contact_sheet

    asked = sample_captions(data.reference, count)
    pipe = models.build_pipeline(
        average.unet, average.text_encoder, data.tokenizer, data.autoencoder().to(average.unet.device)
    )
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(
        [caption(data.reference.names[subject], colour) for subject, colour in asked],
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images
    pictures = models.as_pictures(models.linear_decode(latents.cpu().float(), data.mean, data.synthesis))
    contact_sheet(pictures).save(path)
    return judge(pictures, asked, data.reference)


def train_unet(arguments: argparse.Namespace) -> None:
    work, device = Path(arguments.work), torch.device(arguments.device)
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    data = Data(work, arguments.native, arguments.subjects)
    model = Denoiser(data.tokenizer, arguments.native).to(device, memory_format=torch.channels_last)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    checkpoint, step, seconds = work / "unet.safetensors", 0, 0.0
    if checkpoint.exists():
        facts = load_checkpoint(checkpoint, model, average, optimizer)
        step, seconds = facts["step"], facts["seconds"]
        torch.manual_seed(arguments.seed + step)
    schedule = Schedule(arguments.steps, arguments.minutes, arguments.rate)
    forward = torch.compile(model) if arguments.compile else model
    tensors = models.build_scheduler(), *(t.to(device) for t in (data.latents, data.tokens, data.no_tokens))
    threads, losses = Threads(device), []
    saved, sampled, began = seconds, seconds, time.monotonic() - seconds
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(data.pairs)} pictures, "
        f"from step {step}",
        flush=True,
    )

    def note(**row) -> None:
        print(row, flush=True)
        with (work / "unet.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")

    def save() -> None:
        save_checkpoint(
            checkpoint,
            model,
            average,
            optimizer,
            {
                "step": step,
                "seconds": seconds,
                "images": step * arguments.batch,
                "native": arguments.native,
                "subjects": len(data.reference.names),
            },
        )

    while (progress := schedule.progress(step, seconds)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step, progress)
        loss = loss_of_batch(forward, *tensors, arguments)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRADIENT, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        update_average(average, model, step, arguments.average)
        step, seconds = step + 1, time.monotonic() - began
        losses.append(loss.detach())
        threads.step()
        if step % 100 == 0:
            note(
                step=step,
                seconds=round(seconds),
                images=step * arguments.batch,
                loss=round(float(torch.stack(losses).mean()), 5),
                rate=optimizer.param_groups[0]["lr"],
            )
            losses.clear()
        if seconds - saved > 60 * arguments.save_minutes:
            saved = seconds
            save()
        if seconds - sampled > 60 * arguments.sample_minutes:
            sampled = seconds
            note(step=step, **vars(preview(data, average, work / f"samples-{step:06d}.png")))
    save()
    note(step=step, **vars(preview(data, average, work / "samples-last.png")))


def train_decoder(arguments: argparse.Namespace) -> None:
    from .emoji_decoder import Crops, train_decoder
    from .emoji_evaluate import through_autoencoder

    torch.manual_seed(arguments.seed)
    work = Path(arguments.work)
    data = Data(work, arguments.native, arguments.subjects)
    autoencoder = data.autoencoder()
    train_decoder(
        autoencoder,
        Crops(arguments.native, arguments.subjects, arguments.seed),
        arguments.minutes,
        work / "decoder.safetensors",
        arguments.batch,
        arguments.device,
    )
    pictures = models.as_pictures(data.pictures)
    print(f"{psnr(through_autoencoder(autoencoder, pictures), pictures):.2f} dB on the training pictures")


def export(arguments: argparse.Namespace) -> None:
    from .emoji_export import export_pipeline

    work, out = Path(arguments.work), Path(arguments.out)
    data = Data(work, arguments.native, arguments.subjects)
    model = Denoiser(data.tokenizer, arguments.native)
    facts = load_checkpoint(work / "unet.safetensors", None, model)
    autoencoder = data.autoencoder()
    autoencoder.load_state_dict(load_file(work / "decoder.safetensors"))
    export_pipeline(
        out,
        models.build_pipeline(model.unet, model.text_encoder, data.tokenizer, autoencoder),
        data.reference,
        work / "tokenizer",
        arguments.sampling_steps,
        arguments.guidance,
        # So small a U-Net needs its resolution-aware parts longer than published, and at 4x both throughout.
        methods={"hidiffusion": {"t1": 1.0}},
        methods_from={"4": {"hidiffusion": {"t1": 1.0, "t2": 1.0}}},
    )
    print(f"{out}: step {facts['step']}")


def evaluate(arguments: argparse.Namespace) -> None:
    from .emoji_evaluate import evaluate

    print(json.dumps(evaluate(arguments.out, device=arguments.device), indent=1))


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = root.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", default="cpu")
    common.add_argument("--native", type=int, default=64, choices=(64, 128), help="picture side in pixels")
    common.add_argument("--subjects", type=int, help="only the first N subjects")
    common.add_argument("--seed", type=int, default=0)
    work = argparse.ArgumentParser(add_help=False)
    work.add_argument("--work", required=True, help="folder for checkpoints, logs and sample sheets")

    unet = commands.add_parser("unet", parents=[common, work], help="train U-Net and text encoder")
    unet.add_argument("--steps", type=int)
    unet.add_argument("--minutes", type=float, help="length of the run, earlier parts of a resumed one included")
    unet.add_argument("--batch", type=int, default=12)
    unet.add_argument("--rate", type=float, default=8e-4, help="peak learning rate")
    unet.add_argument("--bias", type=float, default=0.5, help="timesteps are uniform ** bias; below 1 favours noise")
    unet.add_argument("--average", type=float, default=0.999, help="decay of the weight average")
    unet.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    unet.add_argument("--compile", action="store_true")
    unet.add_argument("--save-minutes", type=float, default=4)
    unet.add_argument("--sample-minutes", type=float, default=10)
    unet.set_defaults(run=train_unet)

    decoder = commands.add_parser("decoder", parents=[common, work], help="train the autoencoder's decoder")
    decoder.add_argument("--minutes", type=float, default=10)
    decoder.add_argument("--batch", type=int, default=8)
    decoder.set_defaults(run=train_decoder)

    out = commands.add_parser("export", parents=[common, work], help="write the pipeline folder")
    out.add_argument("--out", required=True)
    out.add_argument("--sampling-steps", type=int, default=16, help="recorded as the default")
    out.add_argument("--guidance", type=float, default=2.0, help="recorded as the default")
    out.set_defaults(run=export)

    judge_it = commands.add_parser("evaluate", help="measure an exported folder")
    judge_it.add_argument("--out", required=True)
    judge_it.add_argument("--device", default="cpu")
    judge_it.set_defaults(run=evaluate)
    return root


def main() -> None:
    arguments = parser().parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
