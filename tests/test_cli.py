"""What the command line promises: pictures, exit statuses, one clear line for wrong use, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attnswap import cli
from attnswap.pipelines.routes.plan import DESCRIBED
from PIL import Image

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def attnswap(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Runs the command in an empty folder: `attnswap("generate", …)` → status, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a denoising step is run."""
    from diffusers import UNet2DConditionModel

    def forward(*_: object, **__: object) -> None:
        pytest.fail("a denoising step was run")

    monkeypatch.setattr(UNet2DConditionModel, "forward", forward)


def refused(result: tuple[int, str, str], *words: str) -> None:
    """Wrong use: status 2 and one line on standard error with all of `words` in it."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.count("\n") == 1, err
    assert err.startswith("attnswap")
    for word in words:
        assert word in err


class TestGenerate:
    def test_makes_a_picture_of_the_size_asked_for_and_says_where(self, attnswap: Cli, tiny_sd: Path) -> None:
        status, out, _ = attnswap(
            "generate", "a fox", "-m", tiny_sd, "--steps", 2, "--width", 96, "--height", 64, "-o", "fox.png"
        )
        assert status == 0
        assert Image.open("fox.png").size == (96, 64)
        assert "fox.png: 96x64, 2 steps, seed 0" in out
        assert " s on " in out
        assert "peak memory" in out
        assert os.listdir() == ["fox.png"]

    def test_reports_what_a_method_accelerated(self, attnswap: Cli, tiny_sd: Path) -> None:
        _, out, _ = attnswap(
            "generate", "a fox", "-m", tiny_sd, "--steps", 2, "--width", 128, "--height", 128,
            "--method", "hidiffusion", "-o", "fox.png",
        )  # fmt: skip
        assert "hidiffusion" in out
        assert "5 of 32 attention layers" in out

    def test_report_to_standard_output_is_json_alone(self, attnswap: Cli, tiny_sd: Path) -> None:
        status, out, err = attnswap(
            "generate", "a fox", "-m", tiny_sd, "--steps", 1, "--width", 128, "--height", 128,
            "--method", "hidiffusion", "--set", "windows=4,2", "-o", "fox.png", "--report", "-",
        )  # fmt: skip
        document = json.loads(out)
        assert status == 0
        assert document["file"] == "fox.png"
        assert document["job"]["methods"]["hidiffusion"]["windows"] == [4, 2]
        assert document["report"]["config"]["windows"] == [4, 2]
        assert "fox.png" in err

    def test_report_to_a_file(self, attnswap: Cli, tiny_sd: Path) -> None:
        attnswap("generate", "a fox", "-m", tiny_sd, "--steps", 1, "-o", "fox.png", "--report", "fox.json")
        assert json.loads(Path("fox.json").read_text())["job"]["prompt"] == "a fox"

    def test_picks_a_file_name_itself(self, attnswap: Cli, tiny_sd: Path) -> None:
        attnswap("generate", "a fox", "-m", tiny_sd, "--steps", 1, "--seed", 7)
        (name,) = os.listdir()
        assert name.startswith("attnswap-")
        assert name.endswith("-7.png")

    def test_a_picture_is_made_again_from_its_own_file(self, attnswap: Cli, tiny_sd: Path) -> None:
        attnswap(
            "generate", "a fox", "-m", tiny_sd, "--steps", 2, "--width", 128, "--height", 128, "--seed", 3,
            "--negative", "a dog", "--guidance", 3, "--method", "hidiffusion", "--set", "t1=0.9", "-o", "fox.png",
        )  # fmt: skip
        status, _, _ = attnswap("generate", "--from", "fox.png", "-o", "again.png")
        assert status == 0
        assert Path("again.png").read_bytes() == Path("fox.png").read_bytes()

    def test_flags_override_what_the_file_says(self, attnswap: Cli, tiny_sd: Path) -> None:
        attnswap("generate", "a fox", "-m", tiny_sd, "--steps", 1, "-o", "fox.png")
        attnswap("generate", "--from", "fox.png", "--seed", 1, "-o", "other.png")
        assert Path("other.png").read_bytes() != Path("fox.png").read_bytes()

    def test_another_size_from_a_picture_takes_the_presets_settings_for_it(
        self, attnswap: Cli, tiny_sd: Path, copy_of: Callable[[Path], Path]
    ) -> None:
        model = copy_of(tiny_sd)
        large = {"2": {"hidiffusion": {"t1": 1.0}}}
        preset = {"native_side": 64, "steps": 2, "methods": {"hidiffusion": {"t1": 0.5}}, "methods_from": large}
        (model / "attnswap.json").write_text(json.dumps(preset))
        attnswap("generate", "a fox", "-m", model, "--method", "hidiffusion", "--set", "t2=0.1", "-o", "fox.png")
        _, out, _ = attnswap("generate", "--from", "fox.png", "--width", 128, "--height", 128, "--report", "-")
        config = json.loads(out)["report"]["config"]
        assert (config["t1"], config["t2"]) == (1.0, 0.1)
        _, out, _ = attnswap("generate", "--from", "fox.png", "--seed", 1, "--report", "-")
        assert json.loads(out)["report"]["config"]["t1"] == 0.5

    def test_the_global_random_state_changes_nothing(self, attnswap: Cli, tiny_sd: Path) -> None:
        for name in ("a.png", "b.png"):
            torch.rand(1)
            attnswap("generate", "a fox", "-m", tiny_sd, "--steps", 1, "-o", name)
        assert Path("a.png").read_bytes() == Path("b.png").read_bytes()

    def test_draws_no_progress_bar_where_nobody_looks(self, attnswap: Cli, tiny_sd: Path) -> None:
        _, _, err = attnswap("generate", "a fox", "-m", tiny_sd, "--steps", 1, "-o", "fox.png")
        assert "%" not in err

    def test_draws_one_for_a_run_of_more_than_two_seconds(
        self, attnswap: Cli, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from diffusers import UNet2DConditionModel

        forward = UNet2DConditionModel.forward

        def slow(*arguments: Any, **named: Any) -> Any:
            time.sleep(0.8)
            return forward(*arguments, **named)

        monkeypatch.setattr(UNet2DConditionModel, "forward", slow)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        _, _, err = attnswap("generate", "a fox", "-m", tiny_sd, "--steps", 4, "-o", "fox.png")
        assert "4/4" in err


class TestRoute:
    FLAGS = ("--steps", 2, "--width", 128, "--height", 128, "--route", "ladder", "--strengths", "0.5")

    def test_goes_by_stages_and_says_which(self, attnswap: Cli, tiny_sd: Path) -> None:
        status, out, _ = attnswap("generate", "a fox", "-m", tiny_sd, *self.FLAGS, "-o", "fox.png")
        assert status == 0
        assert "ladder, stage 1/2: 64x64, 2 steps" in out
        assert "ladder, stage 2/2: 128x128, strength 0.5, 1 steps" in out
        assert os.listdir() == ["fox.png"]

    def test_is_gone_again_from_the_file(self, attnswap: Cli, tiny_sd: Path) -> None:
        attnswap("generate", "a fox", "-m", tiny_sd, *self.FLAGS, "--low-memory", "-o", "fox.png")
        status, _, err = attnswap("generate", "--from", "fox.png", "-o", "again.png")
        assert status == 0
        assert Path("again.png").read_bytes() == Path("fox.png").read_bytes()
        assert "attnswap: low memory:" in err

    def test_can_keep_its_stages_and_goes_on_from_them(self, attnswap: Cli, tiny_sd: Path) -> None:
        command = ("generate", "a fox", "-m", tiny_sd, *self.FLAGS, "--keep-stages", "-o", "fox.png")
        attnswap(*command)
        assert os.listdir(".fox.png.stages") == ["1-64x64.png"]
        status, _, err = attnswap(*command)
        assert status == 0
        assert "stage 1/2: 64x64, 2 steps: taken from .fox.png.stages/1-64x64.png" in err.replace(os.sep, "/")

    def test_draws_one_bar_over_all_stages(self, attnswap: Cli, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from diffusers import UNet2DConditionModel

        forward = UNet2DConditionModel.forward

        def slow(*arguments: Any, **named: Any) -> Any:
            time.sleep(0.8)
            return forward(*arguments, **named)

        monkeypatch.setattr(UNet2DConditionModel, "forward", slow)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        _, _, err = attnswap("generate", "a fox", "-m", tiny_sd, *self.FLAGS, "-o", "fox.png")
        assert "stage 2/2: 128x128, strength 0.5" in err
        assert "3/3" in err

    def test_is_one_of_those_there_are(self) -> None:
        from attnswap.pipelines import routes

        assert tuple(routes.ROUTES) == tuple(DESCRIBED)


@pytest.mark.usefixtures("no_steps")
class TestWrongUseIsSaidBeforeAnyStep:
    def test_no_prompt(self, attnswap: Cli, tiny_sd: Path) -> None:
        refused(attnswap("generate", "-m", tiny_sd), "PROMPT", "--from")

    def test_unknown_flag(self, attnswap: Cli) -> None:
        refused(attnswap("generate", "a fox", "--sede", 1), "--sede")

    def test_unknown_method_with_near_matches(self, attnswap: Cli, tiny_sd: Path) -> None:
        refused(
            attnswap("generate", "a fox", "-m", tiny_sd, "--method", "hidifusion"), "'hidifusion'", "mean hidiffusion"
        )

    def test_unknown_setting_with_near_matches(self, attnswap: Cli, tiny_sd: Path) -> None:
        result = attnswap("generate", "a fox", "-m", tiny_sd, "--method", "hidiffusion", "--set", "window=2,2")
        refused(result, "--set window", "windows")

    @pytest.mark.parametrize("setting", ["windows=2x2", "windows=2", "raunet=maybe", "t1=much", "odd_grids=round"])
    def test_setting_of_the_wrong_kind(self, attnswap: Cli, tiny_sd: Path, setting: str) -> None:
        result = attnswap("generate", "a fox", "-m", tiny_sd, "--method", "hidiffusion", "--set", setting)
        refused(result, setting.split("=")[0])

    def test_setting_the_method_refuses(self, attnswap: Cli, tiny_sd: Path) -> None:
        result = attnswap("generate", "a fox", "-m", tiny_sd, "--method", "hidiffusion", "--set", "windows=0,2")
        refused(result, "hidiffusion", "windows")

    def test_setting_without_a_method(self, attnswap: Cli, tiny_sd: Path) -> None:
        refused(attnswap("generate", "a fox", "-m", tiny_sd, "--set", "t1=0.4"), "--method")

    def test_bundled_model_misspelt(self, attnswap: Cli, bundled_fake: str) -> None:
        refused(attnswap("generate", "a fox", "-m", bundled_fake + "x"), f"Did you mean {bundled_fake}?")

    def test_model_folder_misspelt(self, attnswap: Cli, tiny_sd: Path) -> None:
        refused(attnswap("generate", "a fox", "-m", f"{tiny_sd}s"), f"Did you mean {tiny_sd}?")

    def test_hub_model_that_is_not_here_while_offline(self, attnswap: Cli) -> None:
        refused(attnswap("generate", "a fox", "-m", "nobody/nothing"), "nobody/nothing", "HF_HUB_OFFLINE")

    @pytest.mark.parametrize(("size", "nearest"), [(100, 96), (101, 104), (3, 8), (257, 256)])
    def test_size_the_model_cannot_do_with_the_nearest_it_can(
        self, attnswap: Cli, tiny_sd: Path, size: int, nearest: int
    ) -> None:
        refused(attnswap("generate", "a fox", "-m", tiny_sd, "--width", size), f"width {size}", f"nearest: {nearest}")

    @pytest.mark.parametrize(
        "flag", [("--height", -8), ("--width", 10**6), ("--steps", 0), ("--guidance", "nan"), ("--seed", -1)]
    )
    def test_number_out_of_range(self, attnswap: Cli, tiny_sd: Path, flag: tuple[str, object]) -> None:
        refused(attnswap("generate", "a fox", "-m", tiny_sd, *flag), flag[0][2:], "out of range")

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--route", "stairs"], "'stairs'"),
            (["--route", "ladder"], "64x64 is not above the native size, 64x64"),
            (["--width", 128, "--strengths", "0.4"], "there is no --route"),
            (["--width", 128, "--route", "ladder", "--strengths", "0.4,0.3"], "2 given, 1 needed"),
            (["--width", 128, "--route", "ladder", "--strengths", "1.5"], "1.5 is out of range"),
            (["--width", 128, "--route", "ladder", "--strengths", "0.4;0.3"], "'0.4;0.3'"),
            (["--width", 128, "--route", "ladder", "--steps", 5, "--strengths", "0.1"], "0.2 is enough"),
        ],
    )
    def test_route_that_leads_nowhere(self, attnswap: Cli, tiny_sd: Path, flags: list[object], said: str) -> None:
        refused(attnswap("generate", "a fox", "-m", tiny_sd, *flags), said)

    def test_output_folder_that_does_not_exist(self, attnswap: Cli, tiny_sd: Path) -> None:
        refused(attnswap("generate", "a fox", "-m", tiny_sd, "-o", "no/fox.png"), "folder no does not exist")

    def test_output_folder_that_is_not_writable(
        self, attnswap: Cli, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Tests may run as root, who may write anywhere; so the system's answer is played.
        def denied(*_: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", denied)
        refused(attnswap("generate", "a fox", "-m", tiny_sd, "-o", "fox.png"), "not writable", "Permission denied")

    def test_report_folder_that_does_not_exist(self, attnswap: Cli, tiny_sd: Path) -> None:
        result = attnswap("generate", "a fox", "-m", tiny_sd, "-o", "fox.png", "--report", "no/fox.json")
        refused(result, "folder no does not exist")

    def test_output_of_another_kind(self, attnswap: Cli, tiny_sd: Path) -> None:
        refused(attnswap("generate", "a fox", "-m", tiny_sd, "-o", "fox.jpg"), "fox.jpg", ".png")

    def test_device_that_is_not_here(self, attnswap: Cli, tiny_sd: Path) -> None:
        refused(attnswap("generate", "a fox", "-m", tiny_sd, "--device", "cuda:99"), "cuda:99")

    def test_model_without_a_denoiser(self, attnswap: Cli, tiny_sd: Path) -> None:
        refused(attnswap("generate", "a fox", "-m", tiny_sd / "vae"), "model_index.json", "config.json")

    def test_picture_of_another_program(self, attnswap: Cli) -> None:
        Image.new("RGB", (8, 8)).save("plain.png")
        refused(attnswap("generate", "--from", "plain.png"), "plain.png", "metadata")

    def test_no_command(self, attnswap: Cli) -> None:
        refused(attnswap(), "COMMAND")


class TestFailure:
    def test_out_of_memory_is_one_line_with_a_way_out(
        self, attnswap: Cli, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from diffusers import UNet2DConditionModel

        def forward(*_: object, **__: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(UNet2DConditionModel, "forward", forward)
        status, _, err = attnswap("generate", "a fox", "-m", tiny_sd, "--steps", 1, "-o", "fox.png")
        assert status == 1
        assert err.count("\n") == 1
        assert "out of memory" in err
        assert "--vae-tiling" in err
        assert os.listdir() == []

    def test_interruption_leaves_no_file(self, attnswap: Cli, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Image.Image, "save", interrupted)
        status, _, err = attnswap("generate", "a fox", "-m", tiny_sd, "--steps", 1, "-o", "fox.png")
        assert status == 130
        assert err.count("\n") == 1
        assert os.listdir() == []

    @pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to another process")
    def test_ctrl_c_in_the_middle_of_a_run(self, tiny_sd: Path, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "attnswap.cli", "generate", "a fox", "-m", str(tiny_sd)]
        script = (
            # A shell that runs the tests in the background has them ignore SIGINT.
            "import signal, sys, diffusers\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "forward = diffusers.UNet2DConditionModel.forward\n"
            "def slow(*a, **k):\n"
            "    print('step', flush=True)\n"
            "    return forward(*a, **k)\n"
            "diffusers.UNet2DConditionModel.forward = slow\n"
            "from attnswap.cli import main\n"
            "sys.exit(main(sys.argv[1:]))\n"
        )
        command = [sys.executable, "-c", script, *command[3:], "--steps", "900", "-o", "fox.png"]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "step\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 130, err
        assert "interrupted" in err
        assert "Traceback" not in err
        assert list(tmp_path.iterdir()) == []


class TestInspect:
    def test_lists_every_attention_layer_with_the_reason(self, attnswap: Cli, tiny_sd: Path) -> None:
        status, out, _ = attnswap("inspect", tiny_sd, "--method", "hidiffusion")
        assert status == 0
        assert "5 of 32 attention layers" in out
        assert "+ down_blocks.0.attentions.0.transformer_blocks.0.attn1" in out
        assert "- mid_block.attentions.0.transformer_blocks.0.attn2" in out

    def test_needs_no_weights(self, attnswap: Cli, tiny_sd: Path, copy_of: Callable[[Path], Path]) -> None:
        folder = copy_of(tiny_sd)
        for weights in folder.rglob("*.safetensors"):
            weights.unlink()
        assert attnswap("inspect", folder)[0] == 0

    def test_unknown_method(self, attnswap: Cli, tiny_sd: Path) -> None:
        refused(attnswap("inspect", tiny_sd, "--method", "hidifusion"), "mean hidiffusion")


class TestDoctor:
    def test_is_one_screen(self, attnswap: Cli) -> None:
        status, out, _ = attnswap("doctor")
        lines = out.splitlines()
        assert status == 0
        assert len(lines) <= 25
        assert max(map(len, lines)) <= 100

    def test_names_versions_devices_backends_and_the_state_of_the_hub(self, attnswap: Cli) -> None:
        from attnswap import kernels

        _, out, _ = attnswap("doctor")
        for word in (
            f"torch {torch.__version__}",
            "diffusers",
            "cpu:",
            "window_attention: ",
            "offline",
            *kernels.ops(),
        ):
            assert word in out

    @pytest.mark.parametrize(
        ("backend", "said"), [("triton", "cannot run on triton"), ("trition", "unknown backend 'trition'")]
    )
    def test_says_what_is_wrong_with_the_backend_asked_for(
        self, attnswap: Cli, monkeypatch: pytest.MonkeyPatch, backend: str, said: str
    ) -> None:
        monkeypatch.setenv("ATTNSWAP_BACKEND", backend)
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        status, out, _ = attnswap("doctor")
        assert status == 0
        assert said in next(line for line in out.splitlines() if line.startswith("op"))


class TestBench:
    class Result:
        def table(self) -> str:
            return "the table"

        def write(self, path: str) -> None:
            Path(path).write_text("{}")

    def test_prints_a_table_and_writes_json(self, attnswap: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        from attnswap.benchmarks import runner

        asked: list[object] = []
        monkeypatch.setattr(runner, "run", lambda ops, **_: asked.append(ops) or self.Result())
        status, out, _ = attnswap("bench", "--op", "window_attention", "--quick", "--json", "b.json")
        assert (status, out) == (0, "the table\n")
        assert asked == [["window_attention"]]
        assert Path("b.json").exists()

    def test_times_a_model(self, attnswap: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
        from attnswap.benchmarks import models

        asked: list[object] = []
        monkeypatch.setattr(models, "run", lambda model, **_: asked.append(model) or self.Result())
        assert attnswap("bench", "--model", "emoji-sd")[0] == 0
        assert asked == ["emoji-sd"]

    def test_unknown_model(self, attnswap: Cli) -> None:
        refused(attnswap("bench", "--model", "./nothing"), "./nothing")

    def test_unknown_op_with_near_matches(self, attnswap: Cli) -> None:
        refused(attnswap("bench", "--op", "windw_attention"), "window_attention")

    def test_output_folder_is_checked_before_the_work(self, attnswap: Cli) -> None:
        refused(attnswap("bench", "--json", "no/b.json"), "folder no does not exist")


class TestHelp:
    @pytest.mark.parametrize("command", [(), ("generate",), ("inspect",), ("bench",), ("doctor",)])
    def test_fits_a_screen(self, attnswap: Cli, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "100")
        status, out, _ = attnswap(*command, "--help")
        assert status == 0
        assert len(out.splitlines()) <= 57

    @pytest.mark.parametrize("command", [("generate",), ("distill", "linfusion"), ("distill", "clear")])
    def test_fits_eighty_columns(
        self, attnswap: Cli, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        described = attnswap(*command, "--help")[1].split("\n\n", 1)[1]  # after the usage
        assert max(map(len, described.splitlines())) <= 80

    @pytest.mark.parametrize("command", ["generate", "inspect", "bench"])
    def test_names_every_method_and_bundled_model(
        self, attnswap: Cli, command: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from attnswap import methods
        from attnswap.pipelines.load import bundled

        monkeypatch.setenv("COLUMNS", "200")  # no name is broken at its hyphen
        out = " ".join(attnswap(command, "--help")[1].split())
        assert f"{', '.join(methods())} (default: " in out
        assert all(f" {name}, " in out for name in bundled())

    def test_says_of_every_route_what_it_is(self, attnswap: Cli) -> None:
        out = attnswap("generate", "--help")[1]
        assert all(f"  {name:16} {what}" in out for name, what in DESCRIBED.items())

    def test_version(self, attnswap: Cli) -> None:
        from attnswap import __version__

        assert attnswap("--version")[1] == f"attnswap {__version__}\n"

    def test_answers_without_loading_torch(self) -> None:
        code = "import sys; from attnswap.cli import build_parser; build_parser(); sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

    def test_runs_as_a_module(self) -> None:
        done = subprocess.run([sys.executable, "-m", "attnswap.cli", "--version"], capture_output=True, text=True)
        assert done.stdout.startswith("attnswap ")
