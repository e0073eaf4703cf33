"""Distillation in two processes: each sees other pictures, and both come to the same weights."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

# What a process ends with is only written by the first one; here each tells.
PROCESS = """
import os, sys
from pathlib import Path
from attnswap.training.distill import distill
from attnswap.training.distill_report import write_report
from attnswap.training.distill_settings import ClearSettings, LinFusionSettings
from attnswap.training.distill_trainer import Trainer
from safetensors.torch import save_file

method, model, data, folder = sys.argv[1:]
train = Trainer.train

def tell(trainer, examples):
    train(trainer, examples)
    weights = {name: tensor.detach().clone() for name, tensor in trainer.student.named_parameters().items()}
    save_file(weights, Path(folder, os.environ["RANK"] + ".safetensors"))

Trainer.train = tell
common = dict(data=data, steps=3, batch=2, rate=1e-2, ema=0.9, cpu=True, report_pictures=0)
if method == "clear":
    settings = ClearSettings(model, Path(folder, "out"), **common, size=32, radius=3, down_factor=2)
else:
    settings = LinFusionSettings(model, Path(folder, "out"), **common)
run = distill(settings)
if run is not None:
    write_report(run)
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this build of torch has no gloo")
@pytest.mark.parametrize("method", ["linfusion", "clear"])
def test_two_processes_come_to_the_same_weights(
    method: str, tiny_sdxl: Path, tiny_flux: Path, pictures: Path, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    model = tiny_flux if method == "clear" else tiny_sdxl
    command = [sys.executable, "-c", PROCESS, method, str(model), str(pictures), str(tmp_path)]
    running = [
        subprocess.Popen(
            command, env={**os.environ, **meet, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert (report["processes"], report["steps"], report["pictures"]) == (2, 3, 12)
