"""docs/support.md is what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest
from attnswap.accel import support
from attnswap.accel.families import FAMILIES
from attnswap.accel.methods import methods

PAGE = Path(support.__file__).parents[1] / "docs" / "support.md"


def test_the_page_is_what_the_code_gives(tmp_path: Path) -> None:
    assert support.main(["--write", str(tmp_path / "support.md")]) == 0
    written = (tmp_path / "support.md").read_text(encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == written, "run python -m attnswap.accel.support --write docs/support.md"
    for name in (*methods(), *(family.model_class for family in FAMILIES)):
        assert f"| `{name}` |" in written


def test_the_table_alone_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "rows", lambda: iter([support.Row(*map(str, range(len(support.COLUMNS))))]))
    assert support.main([]) == 0
    assert capsys.readouterr().out == support.table() + "\n"
