"""Every shipped Triton configuration compiles for every target, without a GPU, and fits."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from attnswap.kernels import aot
from attnswap.kernels.targets import TARGETS, Config, Shipped

pytest.importorskip("triton")
PAGE = Path(aot.__file__).parents[1] / "docs" / "kernels.md"
MEASURED = ("registers", "spills", "shared KiB")


def rows(page: Path) -> list[dict[str, str]]:
    """The table of a page, a row as {column: cell}."""
    table = page.read_text(encoding="utf-8").partition(aot.BEGIN)[2].partition(aot.END)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def compiled_rows(page: Path) -> list[tuple[str, ...]]:
    return [tuple(cell for column, cell in row.items() if column not in MEASURED) for row in rows(page)]


def test_shipped_configurations_compile_for_every_target_and_fit(tmp_path):
    """The command itself, in a process where Triton compiles and does not interpret."""
    page = shutil.copy(PAGE, tmp_path / "kernels.md")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "attnswap.kernels.aot", "--write", page],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = rows(page)
    assert {row["target"] for row in found} == {target.name for target in TARGETS}
    assert all(int(row["registers"]) > 0 and int(row["spills"]) == 0 for row in found)
    assert compiled_rows(PAGE) == compiled_rows(page), f"outdated: python -m attnswap.kernels.aot --write {PAGE.name}"


def test_every_target_has_every_configuration_of_a_kernel():
    per_target = {
        target.name: sorted(
            (entry.kernel.__name__, entry.dtype, entry.variant)
            for entry in aot.shipped()
            if entry.target.name == target.name
        )
        for target in TARGETS
    }
    assert len({str(names) for names in per_target.values()}) == 1, per_target


def kernel():
    """Stands for a compiled kernel where only its name matters."""


@pytest.mark.parametrize(
    ("usage", "message"),
    [
        (aot.Usage(255, 8, 0), "spills 8"),
        (aot.Usage(64, 0, 101377), "needs 101377 bytes of shared memory, sm_80 has 101376"),
    ],
    ids=["spill", "shared memory"],
)
def test_a_configuration_that_does_not_fit_is_a_problem(usage, message):
    entry = Shipped(kernel, TARGETS[0], "fp16", "D 64", Config(64, 64, 4, 2), {}, {})
    (problem,) = aot.problems(entry, usage)
    assert problem == f"kernel sm_80 fp16 D 64 64x64 4 2: {message}"
    assert aot.problems(entry, aot.Usage(255, 0, 101376)) == []


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="markers"):
        aot.insert("# Kernels", "table")


def test_interpreted_kernels_are_not_taken_for_compiled_ones(monkeypatch, capsys):
    monkeypatch.setattr(aot.dispatch, "triton_interprets", lambda: True)
    with pytest.raises(SystemExit) as exit_:
        aot.main([])
    assert exit_.value.code == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
