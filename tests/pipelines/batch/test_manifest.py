"""A manifest becomes jobs, or every line of it that is wrong is named with the reason, before anything is loaded."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from attnswap.pipelines.batch import records
from attnswap.pipelines.batch.manifest import BadManifest, Problem, Row, parse, read
from attnswap.pipelines.errors import BadInput
from attnswap.pipelines.job import Job
from PIL import Image

DEFAULTS = Job("", width=64, steps=20, seed=5, negative="text")
Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(name: str, text: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return written


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class TestText:
    def test_each_line_is_a_prompt_made_as_the_defaults_say(self, write: Write) -> None:
        rows = read(write("prompts.txt", '# a fox, "red"\n\n  \na dog; blue'), DEFAULTS)
        assert [(row.line, row.id, row.job.prompt) for row in rows] == [
            (1, "0001", '# a fox, "red"'),
            (4, "0002", "a dog; blue"),
        ]
        assert rows[0].job == Job('# a fox, "red"', width=64, steps=20, seed=5, negative="text")

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_lines_end_as_on_any_system(self, write: Write, end: str) -> None:
        rows = read(write("prompts.TXT", end.join(["a fox", "", "a dog"])), DEFAULTS)
        assert [(row.line, row.job.prompt) for row in rows] == [(1, "a fox"), (3, "a dog")]

    def test_only_line_ends_end_a_line(self, write: Write) -> None:
        prompt = "a fox\x0bon\x85a\u2028hill\x1c"
        assert [row.job.prompt for row in read(write("prompts.txt", prompt), DEFAULTS)] == [prompt]

    def test_unicode_stays_as_it_is_written(self, write: Write) -> None:
        prompts = ["ein Füchslein", unicodedata.normalize("NFD", "ein Füchslein"), "狐 🦊 \u200d", "e\u0301\u202e"]
        path = write("prompts.txt", b"\xef\xbb\xbf" + "\n".join(prompts).encode())
        assert [row.job.prompt for row in read(path, DEFAULTS)] == prompts


class TestJsonLines:
    def test_a_line_is_an_object(self, write: Write) -> None:
        Image.new("RGB", (4, 4)).save(write("fox.png", ""))
        fields = {
            "prompt": "a fox", "negative": "", "seed": 2**63 - 1, "width": 32, "height": "48", "frames": 9,
            "fps": 23.976, "steps": "12.0", "guidance": 7, "method": "hidiffusion", "settings": {"t1": 0.4},
            "image": "fox.png", "strength": "0.5", "id": "füchslein",
        }  # fmt: skip
        assert set(fields) == set(records.FIELDS)
        path = write("rows.jsonl", "\ufeff\n" + jsonl(fields))
        assert read(path, DEFAULTS) == (
            Row(
                2,
                "füchslein",
                Job(
                    "a fox",
                    negative="",
                    seed=2**63 - 1,
                    width=32,
                    height=48,
                    frames=9,
                    fps=Fraction(24000, 1001),
                    steps=12,
                    guidance=7.0,
                    methods={"hidiffusion": {"t1": 0.4}},
                    image=path.parent / "fox.png",
                    strength=0.5,
                ),
            ),
        )

    def test_null_is_not_given(self, write: Write) -> None:
        (row,) = read(write("rows.jsonl", jsonl({**dict.fromkeys(records.FIELDS), "prompt": "a fox"})), DEFAULTS)
        assert row == Row(1, "0001", Job("a fox", width=64, steps=20, seed=5, negative="text"))

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ('{"prompt": "a fox"', "no JSON, at column 19: Expecting ',' delimiter."),
            ("a fox", "no JSON, at column 1: Expecting value."),
            ('["a fox"]', "a line must be an object"),
            ('{"prompt": "a", "prompt": "b"}', "'prompt' is there twice"),
            ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "not readable"),
            ("[" * 100_000, "not readable: maximum recursion depth"),
            ('{"prompt": "half \\ud83e"}', "prompt has half a character"),
            ('{"prompt": "a\\u0000fox"}', "prompt has a NUL character"),
            ('{"seed": 1}', "no prompt."),
            ('{"prompt": " \\n"}', "the prompt is blank."),
            ('{"prompt": 5}', "prompt 5 is no text."),
        ],
    )
    def test_a_line_that_is_none_is_named_and_the_others_are_read(self, write: Write, line: str, said: str) -> None:
        path = write("rows.jsonl", f'{{"prompt": "one"}}\n{line}\n{{"prompt": "three"}}\n')
        rows, [problem] = parse(path, DEFAULTS)
        assert [row.id for row in rows] == ["0001", "0003"]
        assert problem.line == 2
        assert said in problem.text


class TestCsv:
    def test_cells_are_quoted_as_in_rfc_4180(self, write: Write) -> None:
        text = 'id,prompt,steps,negative\r\n007,"a ""red"" fox,\r\nlarge",12,\r\n\r\n,a dog\r\n,,,\r\n'
        rows = read(write("rows.csv", b"\xef\xbb\xbf" + text.encode()), DEFAULTS)
        assert [(row.line, row.id, row.job.prompt, row.job.steps, row.job.negative) for row in rows] == [
            (2, "007", 'a "red" fox,\r\nlarge', 12, "text"),
            (5, "0002", "a dog", 20, "text"),
        ]

    @pytest.mark.parametrize("delimiter", [",", ";", "\t"])
    def test_cells_are_divided_as_spreadsheets_do_anywhere(self, write: Write, delimiter: str) -> None:
        text = '"prompt"|settings|method|guidance\n"a fox, red; large"|"radius=8; ntk_factor=1.5"|clear|7.5\n'
        (row,) = read(write("rows.csv", text.replace("|", delimiter)), DEFAULTS)
        assert (row.job.prompt, row.job.guidance) == ("a fox, red; large", 7.5)
        assert row.job.methods == {"clear": {"radius": 8.0, "ntk_factor": 1.5}}

    def test_one_column_may_have_any_sign(self, write: Write) -> None:
        rows = read(write("rows.csv", 'prompt\n"a fox, red"\na dog; blue\n'), DEFAULTS)
        assert [row.job.prompt for row in rows] == ["a fox, red", "a dog; blue"]

    @pytest.mark.parametrize(
        ("header", "said"),
        [
            ("a fox,12", "found 'a fox', '12'"),
            ('"prompt', "unexpected end of data"),
            ("Prompt", "found 'Prompt'"),
            ("", "found nothing"),
        ],
    )
    def test_the_first_line_must_name_the_fields(self, write: Write, header: str, said: str) -> None:
        with pytest.raises(BadInput, match=r"rows\.csv:1: the first line of a CSV names the fields") as refusal:
            read(write("rows.csv", header), DEFAULTS)
        assert said in str(refusal.value)

    def test_what_is_wrong_in_the_header_is_said_once(self, write: Write) -> None:
        rows, problems = parse(write("rows.csv", "prompt,promt,seed,seed,\na fox,1,2,3,\na dog,1,2,x,\n"), DEFAULTS)
        assert [row.line for row in rows] == [2]
        assert problems == [
            Problem(1, "unknown field 'promt'. Did you mean prompt?"),
            Problem(1, "'seed' is there 2 times."),
            Problem(3, "seed 'x' is no whole number."),
        ]

    @pytest.mark.parametrize(
        ("line", "said"),
        [
            ("a fox, red,12", "3 cells, but the header names 2 fields: a cell with a comma in it needs quotes"),
            ('"a "red" fox",12', "no CSV: ',' expected after '\"'"),
            (f"{'a' * 200_000},12", "no CSV: field larger than field limit"),
            ("a\0fox,12", "prompt has a NUL character"),
        ],
    )
    def test_a_line_that_is_none_is_named_and_the_others_are_read(self, write: Write, line: str, said: str) -> None:
        rows, [problem] = parse(write("rows.csv", f"prompt,steps\n{line}\na dog,12\n"), DEFAULTS)
        assert [row.line for row in rows] == [3]
        assert problem.line == 2
        assert said in problem.text

    def test_a_quote_left_open_is_named_where_it_begins(self, write: Write) -> None:
        _, problems = parse(write("rows.csv", 'prompt\na fox\n"a dog\na cat\na cow\n'), DEFAULTS)
        assert problems == [Problem(3, "no CSV, up to line 5: unexpected end of data.")]


class TestTheFile:
    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("rows.json", b"{}", "must end in .jsonl, .csv or .txt"),
            ("rows", b"{}", "must end in .jsonl, .csv or .txt"),
            ("rows.txt", b"", "has no rows"),
            ("rows.txt", b"\xef\xbb\xbf \r\n\t\n", "has no rows"),
            ("rows.jsonl", b"\n\n", "has no rows"),
            ("rows.csv", b"prompt,seed\n\n,\n", "has no rows"),
            ("rows.txt", "a fox".encode("utf-16"), "is UTF-16: save it as UTF-8"),
            ("rows.csv", "prompt\n".encode("utf-32"), "is UTF-32: save it as UTF-8"),
            (
                "rows.txt",
                b"a fox\r\na f\xfcchs\n",
                "rows.txt:2: byte 4 of the line, 0xFC, is not UTF-8: save the manifest as UTF-8",
            ),
            ("rows.txt", b"a fox\n" * 100_001, "has more than 100000 rows"),
        ],
    )
    def test_what_is_no_manifest_is_refused_in_a_line(self, write: Write, name: str, content: bytes, said: str) -> None:
        with pytest.raises(BadInput, match=re.escape(said)) as refusal:
            read(write(name, content), DEFAULTS)
        assert "\n" not in str(refusal.value)

    def test_there_must_be_a_file(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match=r"none\.csv does not exist"):
            read(tmp_path / "none.csv", DEFAULTS)
        (tmp_path / "folder.csv").mkdir()
        with pytest.raises(BadInput, match=r"folder\.csv is a folder"):
            read(tmp_path / "folder.csv", DEFAULTS)
        with pytest.raises(BadInput, match="cannot be read"):
            read(tmp_path / "nul\0.csv", DEFAULTS)

    def test_ids_are_as_wide_as_the_manifest_needs(self, write: Write) -> None:
        rows = read(write("rows.txt", "a fox\n" * 10_000), DEFAULTS)
        assert (rows[0].id, rows[-1].id) == ("00001", "10000")

    def test_prompts_of_any_length_are_read(self, write: Write) -> None:
        prompt = "狐 and a dog, " * 10_000
        for name, text in (
            ("rows.txt", prompt),
            ("rows.jsonl", json.dumps({"prompt": prompt})),
            ("rows.csv", f'prompt\n"{prompt[:100_000]}"'),
        ):
            (row,) = read(write(name, text), DEFAULTS)
            assert row.job.prompt == prompt[: len(row.job.prompt)]
            assert len(row.job.prompt) >= 100_000


class TestBadManifests:
    BAD: tuple[dict[str, Any], ...] = (
        {"prompt": ""},
        {"prompt": None},
        {"prompt": 3},
        {"seed": -1},
        {"seed": "one"},
        {"width": 0},
        {"height": 1e9},
        {"frames": 2.5},
        {"fps": "fast"},
        {"steps": True},
        {"guidance": "high"},
        {"method": "claer"},
        {"method": "clear", "settings": {"raduis": 1}},
        {"method": "clear", "settings": {"radius": 0}},
        {"image": "none.png"},
        {"strength": 0.5},
        {"id": "../fox"},
        {"id": "row-0"},
        {"colour": "red"},
    )

    def test_of_200_rows_the_20_bad_ones_are_named_and_no_other(self, write: Write) -> None:
        rows: list[dict[str, Any]] = [{"prompt": f"a fox {number}", "id": f"row-{number}"} for number in range(200)]
        bad = [7 + 9 * place for place in range(20)]
        for place, wrong in zip(bad, self.BAD, strict=False):
            rows[place] |= wrong
        lines = [json.dumps(row) for row in rows]
        lines[bad[-1]] = lines[bad[-1]][:-1]
        path = write("rows.jsonl", "\n".join(lines))

        with pytest.raises(BadManifest) as refusal:
            read(path, DEFAULTS)

        *said, last = str(refusal.value).splitlines()
        assert last == "20 lines are wrong, 180 right."
        assert all(line.startswith(f"{path}:") for line in said)
        assert [int(line.removeprefix(f"{path}:").partition(":")[0]) for line in said] == [place + 1 for place in bad]
        assert [problem.line for problem in refusal.value.problems] == [place + 1 for place in bad]
        good, _ = parse(path, DEFAULTS)
        assert [row.line for row in good] == [place + 1 for place in range(200) if place not in bad]

    def test_with_very_much_wrong_say_the_first_fifty(self, write: Write) -> None:
        with pytest.raises(BadManifest) as refusal:
            read(write("rows.jsonl", "{}\n" * 60), DEFAULTS)
        said = str(refusal.value).splitlines()
        assert len(said) == 52
        assert said[-2:] == ["and 10 more.", "60 lines are wrong, 0 right."]
        assert len(refusal.value.problems) == 60

    def test_keep_to_a_line_each_whatever_they_hold(self, write: Write) -> None:
        nasty = "a\nb\x1b[2J\u202e" + "x" * 10_000
        path = write("rows.jsonl", json.dumps({"prompt": "a", "method": "clear", "settings": nasty, nasty: 1}))
        with pytest.raises(BadManifest) as refusal:
            read(path, DEFAULTS)
        said = str(refusal.value).splitlines()
        assert len(said) == 3
        assert all(line.isprintable() and len(line) < 1000 for line in said)

    def test_name_problems_that_were_found_elsewhere_in_order(self, tmp_path: Path) -> None:
        rows = [Row(line, str(line), DEFAULTS) for line in (1, 2, 4)]
        error = BadManifest(tmp_path / "m.txt", [Problem(3, "three."), Problem(2, "two.")], rows)
        assert str(error).splitlines() == [
            f"{tmp_path / 'm.txt'}:2: two.",
            f"{tmp_path / 'm.txt'}:3: three.",
            "2 lines are wrong, 2 right.",
        ]
