"""Records `golden/hidiffusion.safetensors` from the published HiDiffusion code. Run by hand, never by a test.

The published package (Apache-2.0) is needed only here, and nothing of it is kept but the numbers it computes:

    pip download hidiffusion==0.1.10 --no-deps --no-binary :all: && tar xf hidiffusion-0.1.10.tar.gz
    PYTHONPATH=hidiffusion-0.1.10 python tests/accel/methods/record_golden.py
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from attnswap.tests.accel.methods.golden_cases import CASES, Case, arguments, build, sampled
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "golden" / "hidiffusion.safetensors"


def published() -> Any:
    """The published module, made importable with today's Diffusers and given two names that it forgot to import."""
    sys.modules["diffusers.pipelines.controlnet.multicontrolnet"] = importlib.import_module(
        "diffusers.models.controlnets.multicontrolnet"
    )
    module = importlib.import_module("hidiffusion.hidiffusion")
    # As in its git repository.
    for name in ("scale_lora_layers", "unscale_lora_layers"):
        setattr(module, name, getattr(diffusers.utils, name))
    return module


@contextmanager
def scripted_draws(unet: torch.nn.Module, shift: Callable[[int, str], int]) -> Iterator[None]:
    """Let the published code's `torch.rand(1)` answer with a chosen shift; one U-Net call is one step."""
    position = {"step": -1, "layer": ""}
    hooks = [unet.register_forward_pre_hook(lambda *_: position.update(step=position["step"] + 1))]
    for name, block in unet.named_modules():
        if hasattr(block, "attn1"):
            hooks.append(block.register_forward_pre_hook(lambda *_, name=name: position.update(layer=name)))
    rand = torch.rand

    def scripted(*size: Any, **options: Any) -> torch.Tensor:
        if size == (1,) and not options:
            return torch.tensor([0.125 + 0.25 * shift(position["step"], position["layer"])])
        return rand(*size, **options)

    torch.rand = scripted
    try:
        yield
    finally:
        torch.rand = rand
        for hook in hooks:
            hook.remove()


def run_published(module: Any, case: Case, pipe: Any, **inputs: Any) -> torch.Tensor:
    module.apply_hidiffusion(pipe, apply_raunet=case.raunet, apply_window_attn=case.windows)
    with scripted_draws(pipe.unet, case.shift_of):
        latents: torch.Tensor = pipe(**inputs).images
    return latents


def main() -> None:
    diffusers.utils.logging.set_verbosity_error()
    module = published()
    tensors, checksums = {}, {}
    for case in CASES:
        pipe = build(case)
        checksums[case.name] = case.checksum(pipe)
        tensors[case.name] = sampled(run_published(module, case, pipe, **arguments(case)))
        print(case.name, checksums[case.name], f"{tensors[case.name].abs().max():.3g}")
    GOLDEN.parent.mkdir(exist_ok=True)
    save_file(tensors, GOLDEN, metadata=checksums)


if __name__ == "__main__":
    main()
