"""`attnswap compare` on the command line: variants from flags, what is said, exit statuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from attnswap.pipelines.compare.variants import Variant
from attnswap.pipelines.errors import BadInput
from attnswap.pipelines.job import Job

from .test_cli import Cli, attnswap, no_steps, refused

__all__ = ["attnswap", "no_steps"]  # fixtures

SMALL = ("--steps", 1, "--width", 128, "--height", 128)


class TestCompare:
    def test_prints_a_line_a_variant_and_leaves_a_page_a_sheet_and_figures(self, attnswap: Cli, tiny_sd: Path) -> None:
        status, out, err = attnswap(
            "compare",
            "a fox",
            "an owl",
            "-o",
            "out",
            "-m",
            tiny_sd,
            *SMALL,
            "--method",
            "hidiffusion",
            "--seeds",
            "1,2",
        )
        assert (status, err.replace("\n", "")) == (0, "")
        assert [line.split()[0] for line in out.splitlines()[3:6]] == ["variant", "dense", "hidiffusion"]
        assert "128x128, 1 step, guidance 7.5, float32, 2 prompts x 2 seeds" in " ".join(out.split())
        assert "out/compare.html" in out
        assert len(list(Path("out").glob("*-hidiffusion.png"))) == 4
        assert len(os.listdir("out")) == 8 + 3

    def test_remembers_what_was_typed(self, attnswap: Cli, tiny_sd: Path) -> None:
        attnswap("compare", "a fox's den", "-o", "out", "-m", tiny_sd, *SMALL, "--method", "hidiffusion")
        command = json.loads(Path("out/compare.json").read_text())["command"]
        assert command.startswith("attnswap compare 'a fox'\"'\"'s den' -o out")

    def test_a_picture_can_be_made_again_from_its_file(self, attnswap: Cli, tiny_sd: Path) -> None:
        attnswap("compare", "a fox", "-o", "out", "-m", tiny_sd, *SMALL, "--method", "hidiffusion", "--set", "t1=0.7")
        made = Path("out/1-a-fox-seed-0-hidiffusion-t1-0.7.png")
        assert attnswap("generate", "--from", made, "-o", "again.png")[0] == 0
        assert Path("again.png").read_bytes() == made.read_bytes()

    def test_without_a_method_says_which_are_compared(self, attnswap: Cli, tiny_sd: Path) -> None:
        _, out, _ = attnswap("compare", "a fox", "-o", "out", "-m", tiny_sd, *SMALL)
        assert "no --method given, so all that apply are compared" in out

    def test_that_compares_nothing_in_the_end_has_failed(
        self, attnswap: Cli, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from attnswap.pipelines.errors import JobFailed
        from attnswap.pipelines.session import Session

        make = Session.make

        def made(self: Session, tasks: Any, **more: Any) -> Any:
            if tasks[0].job.methods:
                raise JobFailed("out of memory")
            return make(self, tasks, **more)

        monkeypatch.setattr(Session, "make", made)
        status, out, _ = attnswap("compare", "a fox", "-o", "out", "-m", tiny_sd, *SMALL, "--method", "hidiffusion")
        assert status == 1
        assert "hidiffusion: failed in 1 of 1: out of memory" in out


class TestWrongUse:
    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            (("--set", "t1=0.5"), "--set t1=0.5: there is no --method before it"),
            (("--method", "hidifusion"), "Did you mean hidiffusion"),
            (("--method", "hidiffusion", "--set", "t3=0"), "t3"),
            (("--method", "hidiffusion", "--method", "hidiffusion"), "2 times"),
            (("--method", "hidiffusion", "--set", "windows=0,1"), "windows"),
            (("--seeds", "1,x"), "1,x"),
            (("--seeds", "1,1"), "seed '1' is there 2 times"),
            (("--seeds", "-1"), "seed -1"),
            (("--width", "65"), "width 65 is not a multiple of 8"),
            (("--width", "0"), "width 0"),
            (("--frames", "9"), "makes pictures, not clips"),
        ],
    )
    def test_is_one_line_before_any_step(
        self, attnswap: Cli, tiny_sd: Path, no_steps: None, flags: tuple[str, ...], words: str
    ) -> None:
        refused(attnswap("compare", "a fox", "-o", "out", "-m", tiny_sd, *flags), words)
        assert os.listdir() == []

    def test_of_a_size_does_not_blame_the_methods(self, attnswap: Cli, tiny_sd: Path, no_steps: None) -> None:
        _, _, err = attnswap("compare", "a fox", "-o", "out", "-m", tiny_sd, "--width", 65)
        assert err.count("width 65 is not a multiple of 8") == 1
        assert "no method applies" not in err

    def test_a_folder_that_holds_something_is_left_alone(self, attnswap: Cli, no_steps: None) -> None:
        Path("out").mkdir()
        Path("out/mine").write_text("")
        refused(attnswap("compare", "a fox", "-o", "out"), "out is not empty")

    def test_a_folder_is_needed(self, attnswap: Cli) -> None:
        refused(attnswap("compare", "a fox"), "-o")


class TestFlags:
    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """What `compare` is asked for."""
        asked: dict[str, Any] = {}

        def compare(job: Job, variants: tuple[Variant, ...], **more: Any) -> None:
            asked.update(job=job, variants=variants, **more)
            raise BadInput("no further")

        monkeypatch.setattr("attnswap.pipelines.compare.run.compare", compare)
        return asked

    def test_a_setting_belongs_to_the_method_before_it(self, attnswap: Cli, asked: dict[str, Any]) -> None:
        attnswap(
            "compare", "a fox", "-o", "out", "--method", "adaspa", "--set", "sparsity=0.8", "--method", "adaspa",
            "--set", "sparsity=0.9", "--set", "min_tokens=64", "--method", "hidiffusion,linfusion", "--method", "auto",
        )  # fmt: skip
        assert {variant.name: variant.methods for variant in asked["variants"]} == {
            "adaspa sparsity=0.8": {"adaspa": {"sparsity": 0.8}},
            "adaspa sparsity=0.9 min_tokens=64": {"adaspa": {"sparsity": 0.9, "min_tokens": 64}},
            "hidiffusion+linfusion": {"hidiffusion": {}, "linfusion": {}},
            "auto": {"auto": {}},
        }

    def test_two_commands_share_no_variants(self, attnswap: Cli, asked: dict[str, Any]) -> None:
        for _ in range(2):
            attnswap("compare", "a fox", "-o", "out", "--method", "adaspa")
            assert len(asked["variants"]) == 1

    def test_prompts_and_seeds_are_all_kept(self, attnswap: Cli, asked: dict[str, Any]) -> None:
        attnswap("compare", "a fox", "an owl", "-o", "out", "--seeds", "3,1")
        assert (asked["prompts"], asked["seeds"], asked["folder"]) == (["a fox", "an owl"], (3, 1), Path("out"))

    @pytest.mark.parametrize(
        ("flags", "model"),
        [((), "emoji-sd"), (("--frames", 9), "emoji-video"), (("--route", "windows"), "emoji-video")],
    )
    def test_clips_are_of_emoji_video(
        self, attnswap: Cli, asked: dict[str, Any], flags: tuple[object, ...], model: str
    ) -> None:
        attnswap("compare", "a fox", "-o", "out", *flags)
        assert asked["job"].model == model


@pytest.mark.skipif(os.name == "nt", reason="sends a signal")
def test_ctrl_c_keeps_what_is_done_and_leaves_no_half_file(tiny_sd: Path, tmp_path: Path) -> None:
    command = (
        "compare", "a fox", "-o", "out", "-m", str(tiny_sd), "--steps", "100", "--method", "hidiffusion",
        "--seeds", ",".join(map(str, range(20))),
    )  # fmt: skip
    # A shell that runs the tests in the background has them ignore SIGINT.
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from attnswap import cli\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/*.png")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted after" in out
    assert "what was made until then is in out" in err
    names = os.listdir(tmp_path / "out")
    assert {"compare.json", "compare.html", "sheet.png", "1-a-fox-seed-0-dense.png"} <= set(names)
    assert not [name for name in names if name.startswith(".")]
