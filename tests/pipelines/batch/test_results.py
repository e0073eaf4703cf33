"""What is left of an earlier run is told by what was asked for and by the bytes of the file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from attnswap.pipelines import save
from attnswap.pipelines.batch import results
from attnswap.pipelines.batch.results import State
from PIL import Image


@pytest.fixture
def row(tmp_path: Path) -> Any:
    file = tmp_path / "a.png"
    file.write_bytes(b"pixels")
    return SimpleNamespace(id="a", asked="q", file=file, row=SimpleNamespace(line=1))


@pytest.mark.parametrize(
    ("change", "state"),
    [
        ({}, State.DONE),
        ({"row": "r"}, State.CHANGED),
        ({"row": None}, State.CHANGED),
        ({"status": "failed"}, State.FAILED),
        ({"sha256": None}, State.DAMAGED),
        ({"sha256": "0" * 64}, State.DAMAGED),
    ],
)
def test_state_of_an_entry(row: Any, change: dict[str, Any], state: State) -> None:
    entry = {"row": "q", "status": "done", "sha256": hashlib.sha256(b"pixels").hexdigest()}
    assert results.state(row, entry | change) is state


def test_state_without_an_entry_or_a_file(row: Any) -> None:
    assert results.state(row, None) is State.NEW
    row.file.unlink()
    assert results.state(row, {"row": "q", "status": "done", "sha256": "0" * 64}) is State.GONE


def test_a_failure_says_where_it_was_only_if_nobody_expected_it(row: Any) -> None:
    try:
        raise ZeroDivisionError("surprise")
    except ZeroDivisionError as error:
        expected = results.failed(row, error, expected=True, worker="")
        unexpected = results.failed(row, error, expected=False, worker="")
    assert (expected["error"], "traceback" in expected) == ("surprise", False)
    assert unexpected["error"] == "ZeroDivisionError: surprise"
    assert 'raise ZeroDivisionError("surprise")' in unexpected["traceback"]


def test_errors_are_put_on_a_line_that_does_a_terminal_no_harm() -> None:
    assert results.on_a_line("one\ntwo") == "one …"
    assert "\x1b" not in results.on_a_line("\x1b[2J" + "x" * 1000)
    assert len(results.on_a_line("x" * 1000)) < 310


def test_foreign_files_are_told_from_ours_and_from_empty_ones(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    save.write_png(image, tmp_path / "ours.png", {"prompt": "a fox"})
    image.save(tmp_path / "theirs.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    foreign = {path.name for path in tmp_path.iterdir() if results.is_foreign(path)}
    assert foreign == {"theirs.png", "text.png", "folder.png"}
    assert not results.is_foreign(tmp_path / "nothing.png")
