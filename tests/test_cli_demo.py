"""`attnswap demo` from the first line it prints to the last file it removes."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .test_cli import Cli, attnswap, refused

__all__ = ["attnswap"]  # a fixture

# Seconds; a server is up in a few, where the machine has nothing else to do.
PATIENCE = 60
# A suite that runs in the background ignores Ctrl-C, and so would its children.
COMMAND = """import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from attnswap import cli
sys.exit(cli.main(sys.argv[1:]))"""


def test_the_help_is_a_screen_and_answers_at_once() -> None:
    script = (
        "import sys; from attnswap import cli\n"
        "try: cli.main(['demo', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'gradio'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert len(shown.stdout.splitlines()) <= 45
    for flag in ("--model", "--weights", "--max-size", "--max-frames", "--max-steps", "--auth", "--share", "--port"):
        assert flag in shown.stdout


def test_without_gradio_it_is_said_what_to_install(attnswap: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else found(name, *rest)
    )
    refused(attnswap("demo"), 'pip install "attnswap[demo]"')


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--auth", "ann"], "USER:PASSWORD"),
        (["--port", 70000], "out of range"),
        (["--max-size", 0], "--max-size 0 is out of range"),
        (["--model", "nothing-like-this"], "no model nothing-like-this"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--weights", "nobody/nothing"], "--weights nobody/nothing"),
    ],
)
def test_wrong_use_is_a_line(attnswap: Cli, flags: list[Any], said: str) -> None:
    refused(attnswap("demo", "--port", 0, *flags), said)


@pytest.mark.parametrize(
    ("flags", "said"), [(["--auth", "ann"], "USER:PASSWORD"), (["--port", "99999"], "--port 99999 is out of range")]
)
def test_what_is_wrong_with_the_address_is_said_at_once(flags: list[str], said: str) -> None:
    script = "import sys; from attnswap import cli; cli.main(sys.argv[1:]); assert 'torch' not in sys.modules"
    shown = subprocess.run([sys.executable, "-c", script, "demo", *flags], capture_output=True, text=True)
    assert said in shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Runs the command in a process of its own, whose temporary files go to `tmp_path`."""
    processes: list[subprocess.Popen[str]] = []

    def started() -> subprocess.Popen[str]:
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", COMMAND, "demo", "--port", "0"],
                env={**os.environ, "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return processes[-1]

    yield started
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_it_says_where_it_is_and_a_signal_ends_it_within_a_step_with_all_its_files(
    tmp_path: Path, start: Callable[[], subprocess.Popen[str]]
) -> None:
    from gradio_client import Client

    server = start()
    assert server.stdout
    said = re.fullmatch(r"attnswap demo: (http://127\.0\.0\.1:\d+/) \(Ctrl-C ends it\)\n", server.stdout.readline())
    assert said
    [folder] = tmp_path.glob("attnswap-demo-*")
    client = Client(said[1], verbose=False, download_files=tmp_path / "downloads")
    long = client.submit("a fox", image=None, width=128, height=128, steps=100, api_name="/image")
    end = time.monotonic() + PATIENCE
    while not re.search(r"step \d+ of 100", str(long.outputs())):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert list(folder.glob("made/*"))
    server.send_signal(signal.SIGTERM)
    out, err = server.communicate(timeout=PATIENCE)
    assert (server.returncode, out) == (0, "Ending after this step; once more ends at once.\n")
    assert "Traceback" not in err
    job = r"^[\d:]{8} visitor \w{4}: emoji-sd, 128x128, 100 steps, dense: [\d.]+ s, Stopped after step \d+ of 100\.$"
    assert re.search(job, err, re.MULTILINE)
    assert "fox" not in err
    assert list(tmp_path.glob("attnswap-demo-*")) == []


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_told_that_it_is_starting_where_that_takes_a_while(
    attnswap: Cli, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    def serve(*_: Any, say: Callable[[str], None], **__: Any) -> None:
        time.sleep(0.2)
        say("here")
        time.sleep(0.1)

    monkeypatch.setattr("attnswap.demo.serve.serve", serve)
    monkeypatch.setattr("attnswap.cli.demo.PATIENCE", 0.05)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    starting = "attnswap demo: starting ...\n" if terminal else ""
    assert attnswap("demo") == (0, f"{starting}here\n", "")


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_ctrl_c_while_it_starts_leaves_nothing_behind(
    tmp_path: Path, start: Callable[[], subprocess.Popen[str]]
) -> None:
    process = start()
    end = time.monotonic() + PATIENCE
    while not list(tmp_path.glob("attnswap-demo-*")):
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert list(tmp_path.glob("attnswap-demo-*")) == []
    assert process.returncode == 130
    assert "interrupted" in err
