"""Clips on the command line: files, what is said of them, one clear line for wrong use, nothing half-written."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnswap.pipelines import save, video_writer
from attnswap.pipelines.errors import BadInput
from attnswap.pipelines.job import Job

from .test_cli import Cli, attnswap, refused

__all__ = ["attnswap"]  # a fixture


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a denoising step is run."""
    from diffusers import WanTransformer3DModel

    def forward(*_: object, **__: object) -> None:
        pytest.fail("a denoising step was run")

    monkeypatch.setattr(WanTransformer3DModel, "forward", forward)


class TestClip:
    def test_says_frames_rate_time_and_memory(self, attnswap: Cli, tiny_wan: Path) -> None:
        pytest.importorskip("av")
        status, out, err = attnswap(
            "generate", "a fox", "-m", tiny_wan, "--frames", 5, "--fps", "23.976", "-o", "fox.mp4"
        )
        assert (status, err.replace("\n", "")) == (0, "")
        assert "fox.mp4: 32x32, 5 frames at 24000/1001 a second (0.2 s), 2 steps, seed 0" in out
        assert " s on " in out
        assert "peak memory" in out
        assert os.listdir() == ["fox.mp4"]
        assert save.read_record(Path("fox.mp4"))["fps"] == "24000/1001"

    def test_picks_a_file_name_itself(self, attnswap: Cli, tiny_wan: Path) -> None:
        pytest.importorskip("av")
        attnswap("generate", "a fox", "-m", tiny_wan, "--steps", 1, "--seed", 7)
        (name,) = os.listdir()
        assert name.startswith("attnswap-")
        assert name.endswith("-7.mp4")

    def test_is_made_again_from_its_own_file_with_changes(self, attnswap: Cli, tiny_wan: Path) -> None:
        pytest.importorskip("av")
        attnswap("generate", "a fox", "-m", tiny_wan, "--seed", 3, "--route", "windows", "--frames", 13, "-o", "a.mp4")
        assert attnswap("generate", "--from", "a.mp4", "-o", "b.mp4")[0] == 0
        assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
        attnswap("generate", "--from", "b.mp4", "--frames", 17, "--window", 5, "-o", "c.gif")
        record = save.read_record(Path("c.gif"))
        assert [record[name] for name in ("seed", "frames", "window", "overlap")] == [3, 17, 5, 2]

    def test_as_frames_alone(self, attnswap: Cli, tiny_wan: Path) -> None:
        _, out, _ = attnswap(
            "generate", "a fox", "-m", tiny_wan, "--steps", 1, "--frames-dir", "fox", "--report", "fox.json"
        )
        assert out.startswith("fox: 32x32, 9 frames")
        assert sorted(os.listdir()) == ["fox", "fox.json"]
        assert len(os.listdir("fox")) == 9
        assert json.loads(Path("fox.json").read_text())["job"]["frames"] == 9

    def test_of_one_frame(self, attnswap: Cli, tiny_wan: Path) -> None:
        _, out, _ = attnswap("generate", "a fox", "-m", tiny_wan, "--steps", 1, "--frames", 1, "--frames-dir", "fox")
        assert ", 1 frame at 8 a second" in out


class TestWithoutAModel:
    @pytest.fixture
    def model(self, attnswap: Cli, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
        """The model of which a picture or clip would have been made."""
        jobs: list[Job] = []

        def generate(job: Job, **_: object) -> None:
            jobs.append(job)
            raise BadInput("no further")

        monkeypatch.setattr("attnswap.pipelines.generate.generate", generate)

        def run(*flags: object) -> str:
            refused(attnswap("generate", *flags), "no further")
            return jobs[-1].model

        return run

    @pytest.mark.parametrize(
        "flags",
        [
            ("-o", "clip.mp4"),
            ("-o", "clip.GIF"),
            ("--frames", 161),
            ("--fps", 24),
            ("--frames-dir", "fox"),
            ("--route", "windows"),
        ],
    )
    def test_a_clip_is_of_emoji_video(self, model: Callable[..., str], flags: tuple[object, ...]) -> None:
        assert model("a fox", *flags) == "emoji-video"
        assert model("a fox", "-m", "emoji-sd", *flags) == "emoji-sd"

    @pytest.mark.parametrize("flags", [(), ("-o", "fox.png"), ("--route", "ladder"), ("--width", 256)])
    def test_a_picture_is_of_emoji_sd(self, model: Callable[..., str], flags: tuple[object, ...]) -> None:
        assert model("a fox", *flags) == "emoji-sd"

    def test_a_clip_made_again_is_of_its_own(self, model: Callable[..., str], attnswap: Cli) -> None:
        job = Job("a fox", model="of/mine", width=8, height=8, steps=1, guidance=1.0, dtype="float32", frames=1)
        with video_writer.writers(Path("a.gif"), None, fps=Fraction(8), record=job.to_record()) as (writer,):
            writer.add(np.zeros((8, 8, 3), np.uint8))
        assert model("--from", "a.gif", "--frames", 9, "-o", "b.gif") == "of/mine"

    def test_adaspa_searches_in_a_clip(self, attnswap: Cli) -> None:
        status, _, err = attnswap(
            "generate", "a fox moving left on a green background", "--method", "adaspa", "--frames", 9, "--steps", 2,
            "-o", "clip.gif", "--report", "clip.json",
        )  # fmt: skip
        assert (status, err) == (0, "")
        document = json.loads(Path("clip.json").read_text())
        assert document["job"]["model"] == "emoji-video"
        assert document["job"]["frames"] == 9
        assert document["report"]["searches"] > 0


@pytest.mark.usefixtures("no_steps")
class TestWrongUseIsSaidBeforeAnyStep:
    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--frames", 10], "frames 10 is not 2n + 1, which this model needs; nearest: 9"),
            (["--frames", 0], "frames 0 is out of range"),
            (["--frames", 999], "more than 127, where the model's positions end; try --route windows"),
            (["--width", 36], "width 36 is not a multiple of 8"),
            (["--fps", "fast"], "fps 'fast' is no number"),
            (["--fps", "1000"], "out of range"),
            (["--fps", "60", "-o", "fox.gif"], "at most 50 frames a second"),
            (["-o", "fox.png"], "makes clips; the name must end in .mp4 or .gif"),
            (["-o", "fox.avi"], ".png or .mp4 or .gif"),
            (["--frames-dir", "no/fox"], "no does not exist"),
            (["--frames-dir", "."], "--frames-dir . is the current folder"),
            (["-o", "fox.gif", "--frames-dir", "fox.gif"], "-o fox.gif and --frames-dir fox.gif would be the same"),
            (
                ["--method", "adaspa", "--set", "search_steps=5,", "--set", "min_tokens=1"],
                "WanPipeline stopped before its first step: search_steps (5,): step 5 is beyond the run of 2 steps",
            ),
            (["--route", "ladder"], "--route ladder is for pictures"),
            (["--window", 5], "there is no --route windows"),
            (["--route", "windows", "--window", 6], "window 6 is not 2n + 1"),
            (["--route", "windows", "--overlap", 3], "overlap 3 is not a multiple of 2 below the window, 9"),
            (["--route", "windows", "--overlap", 10], "below the window, 9"),
        ],
    )
    def test_flag(self, attnswap: Cli, tiny_wan: Path, flags: list[object], said: str) -> None:
        refused(attnswap("generate", "a fox", "-m", tiny_wan, *flags), said)
        assert os.listdir() == []

    @pytest.mark.parametrize(
        "flags",
        [("--frames", 9), ("--fps", 16), ("--overlap", 4), ("--frames-dir", "fox"), ("--route", "windows")],
    )
    def test_of_a_model_that_makes_pictures(self, attnswap: Cli, tiny_sd: Path, flags: tuple[object, object]) -> None:
        refused(attnswap("generate", "a fox", "-m", tiny_sd, *flags), " ".join(map(str, flags)), "makes pictures")

    def test_a_clip_of_a_model_that_makes_pictures(self, attnswap: Cli, tiny_sd: Path) -> None:
        refused(attnswap("generate", "a fox", "-m", tiny_sd, "-o", "fox.mp4"), "makes pictures", ".png")

    def test_mp4_without_pyav(self, attnswap: Cli, tiny_wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("attnswap.pipelines.save.has_av", lambda: False)
        refused(attnswap("generate", "a fox", "-m", tiny_wan), 'pip install "attnswap[video]"')


def test_ctrl_c_while_frames_are_written_leaves_nothing(
    attnswap: Cli, tiny_wan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKLWan

    decode, half_written = AutoencoderKLWan.decode, list[str]()
    calls = itertools.count(1)

    def interrupted(*arguments: Any, **more: Any) -> Any:
        if next(calls) == 3:
            half_written.extend(os.listdir())
            signal.raise_signal(signal.SIGINT)
        return decode(*arguments, **more)

    monkeypatch.setattr(AutoencoderKLWan, "decode", interrupted)
    # A shell that runs the tests in the background has them ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status, _, err = attnswap(
            "generate", "a fox", "-m", tiny_wan, "--steps", 1, "-o", "fox.gif", "--frames-dir", "fox"
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert (status, err) == (130, "attnswap: interrupted; no file was left half-written.\n")
    assert len(half_written) == 2
    assert all(name.endswith(".part") for name in half_written)
    assert os.listdir() == []
