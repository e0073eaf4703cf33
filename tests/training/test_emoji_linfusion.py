"""The distilled weights that ship with `emoji-sd`, and what the model card says of them."""

from __future__ import annotations

from pathlib import Path

import attnswap
import numpy as np
import pytest
import torch
from attnswap.pipelines import load
from attnswap.pipelines.errors import BadInput
from attnswap.training import distill_evaluate
from attnswap.training.distill_evaluate import evaluate, main, ssim

FOLDER = load.BUNDLED / "emoji-sd"


@pytest.fixture(scope="module")
def figures() -> dict:
    return evaluate("emoji-sd", ["auto", None], count=6, device="cpu")


def test_pictures_are_nearly_those_of_dense_attention(figures: dict) -> None:
    dense, linear = figures["dense"], figures["auto"]
    assert dense["count"] == 6
    assert linear["nearest"] >= dense["nearest"] - 0.2
    assert linear["colour"] >= dense["colour"] - 0.2
    assert linear["psnr"] > 30
    assert linear["ssim"] > 0.95


def test_distilling_is_what_made_them_so(figures: dict) -> None:
    assert figures["auto"]["psnr"] > figures["none"]["psnr"] + 8


def test_they_are_found_without_a_name() -> None:
    inspection = attnswap.inspect(load.load(load.find("emoji-sd"), dtype=torch.float32), "linfusion")
    assert inspection.remarks == ("weights: emoji-sd (auto)",)


def test_the_folder_holds_what_was_published_and_is_small() -> None:
    names = {path.name for path in (FOLDER / "linfusion").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 20e6


def test_ssim_is_one_for_the_same_and_less_for_others() -> None:
    pictures = np.random.default_rng(0).random((2, 16, 16, 3), np.float32)
    assert ssim(pictures, pictures) == pytest.approx(1)
    assert ssim(pictures, pictures.mean((1, 2), keepdims=True) + 0 * pictures) < 0.1


def test_a_model_without_captions_needs_some(tiny_sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInput, match="give --captions FILE"):
        evaluate(str(tiny_sd), [None])
    (tmp_path / "c.txt").write_text("a fox\nan owl\n")
    figures = evaluate(str(tiny_sd), [None], captions=tmp_path / "c.txt", count=1, device="cpu")
    assert figures["captions"] == 1
    assert figures["dense"] == {}
    assert set(figures["none"]) == {"psnr", "ssim"}


def test_the_command_prints_json_or_one_line(
    tiny_sd: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["distill_evaluate", "--model", str(tiny_sd)])
    assert main() == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("distill_evaluate: ")
    monkeypatch.setattr(distill_evaluate, "evaluate", lambda model, weights, **options: {"weights": weights, **options})
    monkeypatch.setattr("sys.argv", ["distill_evaluate", "--weights", "none", "--weights", "auto", "--count", "3"])
    assert main() == 0
    printed = capsys.readouterr().out
    assert '"count": 3' in printed
    assert "null" in printed
