"""What `attnswap batch` promises: wrong rows named before any is made, live progress, exit statuses."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attnswap import cli
from attnswap.pipelines import save
from diffusers import UNet2DConditionModel
from PIL import Image

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def attnswap(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_sd: Path) -> Cli:
    """Runs `attnswap batch` in an empty folder with the tiny model and one step → status, output, errors."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        given = [str(argument) for argument in (*arguments, "-m", tiny_sd, "--steps", 1)]
        try:
            status = cli.main(["batch", *given])
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def results(folder: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "results.jsonl").read_text(encoding="utf-8").splitlines()]


class TestManifest:
    def test_of_text(self, attnswap: Cli) -> None:
        Path("prompts.txt").write_text("a fox\n\na cat\n")
        status, out, err = attnswap("prompts.txt", "-o", "out", "--seed", 3)
        assert (status, out) == (0, "2 done: out/results.jsonl\n".replace("/", os.sep))
        assert [line[:11] for line in err.splitlines()[-2:]] == ["[1/2] 0001:", "[2/2] 0002:"]
        assert save.read_record(Path("out/0002.png"))["seed"] == 3
        assert "%" not in err

    def test_of_csv_as_spreadsheets_write_it(self, attnswap: Cli) -> None:
        text = io.StringIO(newline="")
        rows = csv.writer(text)
        rows.writerow(["prompt", "id", "seed", "width"])
        rows.writerow(['a "red" fox, sitting\non a log', "fox 1", "7", "72"])
        Path("rows.csv").write_bytes(b"\xef\xbb\xbf" + text.getvalue().encode())
        assert attnswap("rows.csv", "-o", "out")[0] == 0
        record = save.read_record(Path("out/fox 1.png"))
        assert (record["prompt"], record["seed"]) == ('a "red" fox, sitting\non a log', 7)
        assert Image.open("out/fox 1.png").size == (72, 64)

    def test_with_prompts_of_any_letters_and_of_ten_kilobytes(self, attnswap: Cli) -> None:
        prompts = ["ein Fuchs 🦊, ein Kätzchen, 狐狸", "fox " * 2500]
        ids = ["Füchse-🦊", "long"]
        lines = [
            json.dumps({"prompt": prompt, "id": id}, ensure_ascii=False)
            for prompt, id in zip(prompts, ids, strict=True)
        ]
        Path("rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
        assert attnswap("rows.jsonl", "-o", "out")[0] == 0
        assert [entry["id"] for entry in results()] == ids
        assert [save.read_record(Path(f"out/{id}.png"))["prompt"] for id in ids] == prompts

    def test_of_200_rows_with_20_bad_ones_makes_nothing_and_names_them_all(
        self, attnswap: Cli, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(UNet2DConditionModel, "forward", lambda *_, **__: pytest.fail("a step was run"))
        rows: list[dict[str, Any]] = [{"prompt": f"fox {number}", "id": f"fox-{number}"} for number in range(1, 201)]
        bad = {
            "width": 100, "height": 3, "frames": 5, "fps": 8, "seed": -1, "steps": 0, "guidance": "nan",
            "method": "hidifusion", "settings": "t1=0.4", "image": "no.png", "strength": 0.5, "prompt": " ",
            "id": "fox-1", "negative": 7, "sede": 1,
        }  # fmt: skip
        wrong = dict(zip(range(10, 160, 10), bad.items(), strict=True))
        for number, (name, value) in wrong.items():
            rows[number - 1][name] = value
        wrong_ids = {161: "../up", 163: "a/b", 165: "", 167: "..", 169: "con"}
        for number, id in wrong_ids.items():
            rows[number - 1]["id"] = id
        Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        status, out, err = attnswap("rows.jsonl", "-o", "out")
        assert (status, out) == (2, "")
        assert {int(number) for number in re.findall(r"rows\.jsonl:(\d+): ", err)} == {*wrong, *wrong_ids}
        assert err.endswith("20 lines are wrong, 180 right.\n")
        assert "rows.jsonl:10: width 100 is not a multiple of 8" in err
        assert "makes pictures, not clips" in err
        assert "mean hidiffusion" in err
        assert not Path("out").exists()
        assert "Traceback" not in err

    def test_that_says_the_same_id_twice(self, attnswap: Cli) -> None:
        Path("rows.jsonl").write_text('{"prompt": "a", "id": "fox"}\n{"prompt": "b", "id": "fox"}\n')
        status, _, err = attnswap("rows.jsonl", "-o", "out")
        assert status == 2
        assert "rows.jsonl:2: id 'fox' is taken: line 1 has it, too." in err


class TestStatus:
    @pytest.fixture(autouse=True)
    def manifest(self, attnswap: Cli) -> None:
        Path("rows.jsonl").write_text('{"prompt": "a fox"}\n{"prompt": "a cat", "width": 96}\n{"prompt": "a dog"}\n')

    @pytest.fixture
    def broken(self, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
        """The second row fails for as long as something is in this list."""
        forward, faults = UNet2DConditionModel.forward, [True]

        def sometimes(self: Any, sample: Any, *rest: Any, **named: Any) -> Any:
            if sample.shape[-1] > 8 and faults:
                raise ZeroDivisionError("surprise\nin two lines")
            return forward(self, sample, *rest, **named)

        monkeypatch.setattr(UNet2DConditionModel, "forward", sometimes)
        return faults

    def test_is_1_where_a_row_failed_and_a_resumed_run_tries_it_again(self, attnswap: Cli, broken: list[bool]) -> None:
        status, out, err = attnswap("rows.jsonl", "-o", "out")
        assert status == 1
        assert out.splitlines()[0].startswith("2 done, 1 failed: out")
        assert "  0002 failed: ZeroDivisionError: surprise …\n" in out
        assert "The same command with --resume tries them again." in out
        assert "[2/3] 0002 failed: ZeroDivisionError: surprise …" in err
        assert "Traceback" not in out + err
        broken.clear()
        status, out, err = attnswap("rows.jsonl", "-o", "out", "--resume")
        assert (status, out.splitlines()[0].partition(":")[0]) == (0, "1 done, 2 finished before")
        assert "1 row made again, failed before: 0002." in err

    def test_is_1_where_others_have_failed_at_a_row(self, attnswap: Cli, broken: list[bool]) -> None:
        attnswap("rows.jsonl", "-o", "out", "--claim")
        status, out, _ = attnswap("rows.jsonl", "-o", "out", "--claim")
        assert status == 1
        assert ": 0 done, 1 failed with others, 2 finished before: " in out
        assert "The same command with --resume tries them again." in out

    def test_is_1_where_a_row_failed_too_often(self, attnswap: Cli, broken: list[bool]) -> None:
        status, out, _ = attnswap("rows.jsonl", "-o", "out", "--max-failures", 1)
        assert status == 1
        assert "1 done, 1 failed, 1 left" in out
        assert "Ended early: --max-failures 1 reached. The same command with --resume goes on." in out

    def test_is_0_where_all_is_done_already(self, attnswap: Cli) -> None:
        attnswap("rows.jsonl", "-o", "out")
        status, out, _ = attnswap("rows.jsonl", "-o", "out", "--resume")
        assert (status, out.partition(":")[0]) == (0, "0 done, 3 finished before")

    def test_is_2_where_the_folder_holds_results(self, attnswap: Cli) -> None:
        attnswap("rows.jsonl", "-o", "out")
        status, out, err = attnswap("rows.jsonl", "-o", "out")
        assert (status, out) == (2, "")
        assert "holds 3 of these 3 rows already" in err
        assert "--resume" in err

    @pytest.mark.parametrize(
        ("flags", "said"),
        [
            (["--batch-size", 0], "--batch-size 0 is out of range"),
            (["--max-failures", 0], "--max-failures 0 is out of range"),
            (["--shard", "2/2"], "0/2 to 1/2"),
            (["--shard", "0/2", "--claim"], "take one"),
            (["--method", "hidifusion"], "mean hidiffusion"),
            (["--device", "cuda:99"], "cuda:99"),
        ],
    )
    def test_is_2_for_wrong_use(self, attnswap: Cli, flags: list[object], said: str) -> None:
        status, out, err = attnswap("rows.jsonl", "-o", "out", *flags)
        assert (status, out) == (2, "")
        assert said in err
        assert not Path("out").exists()

    def test_is_2_where_accelerate_has_started_one_process_for_two(
        self, attnswap: Cli, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}.items():
            monkeypatch.setenv(name, value)
        status, _, err = attnswap("rows.jsonl", "-o", "out")
        assert status == 2
        assert "accelerate was asked for several processes" in err

    def test_is_2_where_the_manifest_is_missing(self, attnswap: Cli) -> None:
        assert attnswap("no.jsonl", "-o", "out")[::2] == (2, "attnswap: no.jsonl does not exist.\n")

    def test_dry_run_says_what_there_would_be_to_do(self, attnswap: Cli) -> None:
        status, out, _ = attnswap("rows.jsonl", "-o", "out", "--dry-run")
        assert (status, out) == (0, "3 rows are right, 3 to be made.\n")
        assert not Path("out").exists()


def test_shards_make_all_rows_between_them(attnswap: Cli) -> None:
    Path("prompts.txt").write_text("a fox\na cat\na dog\n")
    _, out, err = attnswap("prompts.txt", "-o", "out", "--shard", "0/2")
    assert out.startswith("0-of-2: 2 done")
    assert "0-of-2: [1/2] 0001: " in err
    attnswap("prompts.txt", "-o", "out", "--shard", "1/2")
    assert [entry["id"] for entry in results()] == ["0001", "0002", "0003"]


@pytest.fixture
def shown(tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Runs three rows of eight slow steps, of which the second fails, on a terminal → status, what it was sent.

    Args of what it gives: interrupt_at: a text at whose appearance Ctrl-C is pressed.
    """
    if not hasattr(os, "fork"):
        pytest.skip("no terminal to be played")
    import pty
    import termios

    manifest = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a fox"}, {"prompt": "a cat", "width": 96}, {"prompt": "a dog"}]
    manifest.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["batch", manifest, "-o", tmp_path / "out", "-m", tiny_sd, "--steps", 8]
    forward = UNet2DConditionModel.forward

    def slow(self: Any, sample: Any, *rest: Any, **named: Any) -> Any:
        time.sleep(0.15)
        if sample.shape[-1] > 8:
            raise ZeroDivisionError("surprise")
        return forward(self, sample, *rest, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", slow)

    def on_the_terminal() -> None:
        status = 70
        try:
            torch.set_num_threads(1)  # the others did not come along
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            status = cli.main([str(argument) for argument in arguments])
            sys.stdout.flush()
        finally:
            os._exit(status)

    def run(interrupt_at: str = "") -> tuple[int, str]:
        child, terminal = pty.fork()
        if not child:
            on_the_terminal()
        termios.tcsetwinsize(terminal, (24, 100))
        sent, waiting = b"", bool(interrupt_at)
        try:
            while data := os.read(terminal, 4096):
                sent += data
                if waiting and interrupt_at.encode() in sent:
                    os.write(terminal, b"\x03")
                    waiting = False
        except OSError:  # Linux says so that the other end is closed
            pass
        os.close(terminal)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), sent.decode()

    return run


class TestTerminal:
    def test_shows_rows_steps_the_time_left_and_failures(self, shown: Callable[..., tuple[int, str]]) -> None:
        status, text = shown()
        assert status == 1
        assert re.search(r"0 of 3 rows \| +\| about \d+ s left", text)
        assert re.search(r"0001 \|.*\| 5/8 steps", text)
        assert re.search(r"2 of 3 rows \|[^|]*\| 1 failed, about \d+ s left", text)
        assert re.search(r"3 of 3 rows \|[^|]*\| 1 failed", text)
        # What is said has a line of its own, from its beginning on.
        assert re.search(r"[\r\n][^\S\n]*\[2/3\] 0002 failed: ZeroDivisionError: surprise\r\n", text)

    def test_says_on_a_line_of_its_own_that_it_will_end(self, shown: Callable[..., tuple[int, str]]) -> None:
        status, text = shown(interrupt_at="2/8 steps")
        assert status == 130
        assert "\r\x1b[Kattnswap: ending after this step; once more ends at once.\r\n" in text
        assert "0 done, 3 left: " in text
