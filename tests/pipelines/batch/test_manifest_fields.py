"""What a row says of each field becomes its job, or is refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from attnswap.pipelines.batch.manifest import Row, parse, read
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


@pytest.fixture
def row(write: Write) -> Callable[..., Row]:
    """The row that fields make, beside a prompt."""

    def made(defaults: Job = DEFAULTS, **fields: Any) -> Row:
        (only,) = read(write("rows.jsonl", json.dumps({"prompt": "a fox", **fields})), defaults)
        return only

    return made


@pytest.fixture
def problems(write: Write) -> Callable[..., list[str]]:
    """What is said of a row with these fields, beside a prompt."""

    def found(defaults: Job = DEFAULTS, **fields: Any) -> list[str]:
        rows, problems = parse(write("rows.jsonl", json.dumps({"prompt": "a fox", **fields})), defaults)
        assert bool(rows) is not bool(problems)
        assert all(problem.line == 1 for problem in problems)
        return [problem.text for problem in problems]

    return found


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class TestNumbers:
    @pytest.mark.parametrize(
        ("field", "value", "read"),
        [
            ("steps", "12", 12),
            ("steps", " 12 ", 12),
            ("steps", 12.0, 12),
            ("seed", "9223372036854775807.0", 2**63 - 1),
            ("seed", 0, 0),
            ("guidance", "1e1", 10.0),
            ("guidance", 0, 0.0),
            ("fps", 16, Fraction(16)),
            ("fps", "24000/1001", Fraction(24000, 1001)),
            ("fps", 12.5, Fraction(25, 2)),
        ],
    )
    def test_are_numbers_or_text_of_one(self, row: Callable[..., Row], field: str, value: Any, read: Any) -> None:
        found = getattr(row(**{field: value}).job, field)
        assert found == read
        assert type(found) is type(read)

    @pytest.mark.parametrize(
        ("field", "value", "said"),
        [
            ("steps", 12.5, "steps 12.5 is no whole number."),
            ("steps", "12.5", "steps '12.5' is no whole number."),
            ("steps", True, "steps True is no whole number."),
            ("steps", "", "steps '' is no whole number."),
            ("steps", [12], "steps [12] is no whole number."),
            ("steps", float("inf"), "steps inf is no whole number."),
            ("steps", 0, "steps 0 is out of range: 1 to 1000."),
            ("width", "1_000", "width '1_000' is no whole number."),
            ("width", 16385, "width 16385 is out of range: 1 to 16384."),
            ("height", -8, "height -8 is out of range: 1 to 16384."),
            ("frames", 100_001, "frames 100001 is out of range: 1 to 100000."),
            ("seed", 2**63, f"seed {2**63} is out of range: 0 to 2^63 - 1."),
            ("seed", 2.0**60, "seed 1.152921504606847e+18 is no whole number."),
            ("guidance", False, "guidance False is no number."),
            ("guidance", "7,5", "guidance '7,5' is no number."),
            ("guidance", 10**400, "guidance 10000"),
            ("guidance", float("nan"), "guidance nan is out of range: 0 or more."),
            ("fps", True, "fps True is no number such as 16, 23.976 or 24000/1001."),
            ("fps", "fast", "fps 'fast' is no number such as 16, 23.976 or 24000/1001."),
            ("fps", 0, "fps 0 is out of range: above 0, at most 240."),
        ],
    )
    def test_of_another_kind_are_refused(
        self, problems: Callable[..., list[str]], field: str, value: Any, said: str
    ) -> None:
        [text] = problems(**{field: value})
        assert text.startswith(said)

    def test_all_that_is_wrong_in_a_row_is_said(self, problems: Callable[..., list[str]]) -> None:
        said = problems(steps="many", width=0, seed=1.5, promtp="b", method="claer", id="a/b", negative=1)
        assert len(said) == 7
        assert "unknown field 'promtp'. Did you mean prompt?" in said


class TestMethods:
    @pytest.fixture
    def methods(self, row: Callable[..., Row]) -> Callable[..., dict[str, Any]]:
        return lambda defaults=DEFAULTS, **fields: row(defaults, **fields).job.methods

    @pytest.mark.parametrize(
        ("fields", "read"),
        [
            ({}, {}),
            ({"method": "none"}, {}),
            ({"method": "dense"}, {}),
            ({"method": "auto"}, {"auto": {}}),
            ({"method": "clear"}, {"clear": {}}),
            ({"method": "hidiffusion, linfusion"}, {"hidiffusion": {}, "linfusion": {}}),
            ({"method": "clear", "settings": {"radius": 8}}, {"clear": {"radius": 8.0}}),
            ({"method": "clear", "settings": {"clear.radius": "8"}}, {"clear": {"radius": 8.0}}),
            (
                {"method": "clear", "settings": "radius=8; ntk_factor=1.5;"},
                {"clear": {"radius": 8.0, "ntk_factor": 1.5}},
            ),
            (
                {"method": "clear", "settings": {"radius": None, "down_factor": None, "weights": None}},
                {"clear": {"radius": None, "down_factor": None, "weights": None}},
            ),
            (
                {"method": "hidiffusion", "settings": {"windows": [4, 2], "round_up": False, "by": "noise"}},
                {"hidiffusion": {"windows": (4, 2), "round_up": False, "by": "noise"}},
            ),
        ],
    )
    def test_are_named_as_on_the_command_line(
        self, methods: Callable[..., dict[str, Any]], fields: dict[str, Any], read: dict[str, Any]
    ) -> None:
        assert methods(**fields) == read

    def test_of_the_defaults_hold_where_a_row_names_none(self, methods: Callable[..., dict[str, Any]]) -> None:
        defaults = Job("", methods={"clear": {"radius": 4.0, "ntk_factor": 2.0}})
        assert methods(defaults) == {"clear": {"radius": 4.0, "ntk_factor": 2.0}}
        assert methods(defaults, settings={"radius": 8}) == {"clear": {"radius": 8.0, "ntk_factor": 2.0}}
        assert methods(defaults, method="clear", settings="radius=8") == {"clear": {"radius": 8.0, "ntk_factor": 2.0}}
        assert methods(defaults, method="none") == {}
        assert methods(defaults, method="hidiffusion") == {"hidiffusion": {}}

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"method": "claer"}, "unknown method 'claer'. Did you mean clear?"),
            ({"method": ["clear"]}, "method ['clear'] is no text."),
            ({"method": " "}, "method is blank: dense attention is called none."),
            ({"method": "none,clear"}, "method 'none,clear': none goes with no other."),
            ({"method": "clear,auto"}, "method auto chooses by itself: name it alone"),
            ({"method": "clear", "settings": {"raduis": 8}}, "settings: raduis: no such setting. Did you mean radius?"),
            ({"method": "clear", "settings": "radius"}, "settings: radius: write it as key=value."),
            ({"method": "clear", "settings": ["radius=8"]}, "settings ['radius=8'] is no text."),
            ({"method": "clear", "settings": {"radius": "far"}}, "settings: radius=far: expected "),
            ({"method": "clear", "settings": {"radius": 0}}, "clear: radius must be a number of tokens, at least 1"),
            ({"method": "clear", "settings": {"linfusion.eps": 1}}, "settings: linfusion.eps: method does not name"),
            ({"settings": {"radius": 8}}, "settings: radius: no method to set it for."),
            ({"method": "hidiffusion", "settings": {"windows": "-" * 100_000 + "1"}}, "settings: windows=-"),
            ({"method": "clear", "settings": {"weights": "a\0b"}}, "settings has a NUL character"),
        ],
    )
    def test_and_settings_are_checked(
        self, problems: Callable[..., list[str]], fields: dict[str, Any], said: str
    ) -> None:
        [text] = problems(**fields)
        assert text.startswith(said)

    def test_auto_takes_no_settings(self, problems: Callable[..., list[str]]) -> None:
        assert len(problems(method="auto", settings={"radius": 8})) == 1
        assert len(problems(Job("", methods={"auto": {}}), settings={"radius": 8})) == 1


class TestPictures:
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_are_found_beside_the_manifest(self, write: Write, row: Callable[..., Row], kind: str) -> None:
        path = write(f"fox.{kind}", "")
        Image.new("RGB", (8, 8)).save(path, kind)
        (path.parent / "link").symlink_to(path)
        for name in (path.name, str(path), "link"):
            job = row(image=name).job
            assert job.image == path.parent / name
            assert job.strength is None

    def test_that_cannot_be_read_are_refused(self, write: Write, problems: Callable[..., list[str]]) -> None:
        Image.new("RGB", (64, 64), "red").save(write("fox.png", ""))
        whole = (write("prompt.txt", "a fox").parent / "fox.png").read_bytes()
        write("short.png", whole[:60])
        write("damaged.png", whole[:50] + b"????" + whole[54:])
        Image.new("RGB", (8, 8)).save(write("fox.gif", ""))
        for name, said in {
            "none.png": "does not exist",
            ".": "is no file",
            "prompt.txt": "is no readable PNG, JPEG or WebP",
            "fox.gif": "is no readable PNG, JPEG or WebP",
            "short.png": "cannot be read: ",
            "damaged.png": "cannot be read: ",
            "x" * 5000: "cannot be read: ",
            "nul\0": "NUL",
        }.items():
            [text] = problems(image=name)
            assert said in text

    def test_with_too_many_pixels_are_refused_by_their_header(
        self, write: Write, problems: Callable[..., list[str]]
    ) -> None:
        for side in (10_000, 14_000):  # of the first, Pillow warns; the second it refuses
            Image.new("1", (side, side)).save(write("large.png", ""))
            [text] = problems(image="large.png")
            assert text == f"image 'large.png' has more than {Image.MAX_IMAGE_PIXELS} pixels."

    def test_strength_goes_with_a_picture(
        self, write: Write, row: Callable[..., Row], problems: Callable[..., list[str]]
    ) -> None:
        Image.new("RGB", (8, 8)).save(write("fox.png", ""))
        assert problems(strength=0.5) == ["strength is for rows with an image."]
        assert row(image="fox.png", strength=1).job.strength == 1.0
        for value in (0, 1.01, -1, float("nan")):
            [text] = problems(image="fox.png", strength=value)
            assert text == f"strength {float(value)} is out of range: above 0, at most 1."

    def test_the_strength_of_the_defaults_is_for_rows_with_a_picture(
        self, write: Write, row: Callable[..., Row]
    ) -> None:
        Image.new("RGB", (8, 8)).save(write("fox.png", ""))
        defaults = Job("", strength=0.5)
        assert row(defaults, image="fox.png").job.strength == 0.5
        assert row(defaults).job.strength is None
        assert row(Job("", strength=0.5, image=Path("dog.png"))).job.strength == 0.5


class TestIds:
    @pytest.mark.parametrize(
        ("value", "read"),
        [("fox-1.2", "fox-1.2"), ("a fox", "a fox"), ("狐🦊", "狐🦊"), ("é" * 60, "é" * 60), (7, "7"), (1.5, "1.5")],
    )
    def test_name_files(self, row: Callable[..., Row], value: Any, read: str) -> None:
        assert row(id=value).id == read

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            ("a/b", "/ cannot be in one"),
            ("..\\b", "\\ cannot be in one"),
            ("..", "dot"),
            ("a..b", "dot"),
            (".hidden", "dot"),
            ("fox.", "dot"),
            ("fox ", "space"),
            (" fox", "space"),
            ("fox\n", "control character"),
            ("\x1b[2J", "control character"),
            ("fox\u2028x", "control character"),
            ("fox\ud83e", "control character"),
            ("a\0b", "control character"),
            ("", "blank"),
            ("con", "device"),
            ("Nul.txt", "device"),
            ("COM1", "device"),
            ("lpt¹.a", "device"),
            ("é" * 61, "122 bytes are more than 120"),
            ("results", "own files"),
            ("Results.jsonl", "own files"),
            (True, "is no text"),
            (["fox"], "is no text"),
            *((f"fox{sign}", f"{sign} cannot be in one") for sign in ':*?"<>|'),
        ],
    )
    def test_that_cannot_are_refused(self, problems: Callable[..., list[str]], value: Any, said: str) -> None:
        [text] = problems(id=value)
        assert said in text

    @pytest.mark.parametrize("value", ["console", "com", "results-1", "fox.results", "lpt10"])
    def test_that_only_look_like_them_are_taken(self, row: Callable[..., Row], value: str) -> None:
        assert row(id=value).id == value

    @pytest.mark.parametrize(
        ("one", "other"),
        [("fox", "fox"), ("Fox", "fox"), ("é", "e\u0301"), ("É", "e\u0301"), ("straße", "STRASSE"), ("0003", None)],
    )
    def test_are_there_once(self, write: Write, one: str, other: str | None) -> None:
        first, second = {"prompt": "a", "id": one}, {"prompt": "c", "id": other}
        rows, problems = parse(write("rows.jsonl", jsonl(first, {"prompt": "b"}, second)), DEFAULTS)
        assert [row.line for row in rows] == [1, 2]
        assert [problem.line for problem in problems] == [3]
        assert "is taken" in problems[0].text
        assert "line 1" in problems[0].text

    def test_stay_the_same_when_another_row_is_mended(self, write: Write) -> None:
        bad, _ = parse(write("rows.jsonl", jsonl({"prompt": ""}, {"prompt": "b"})), DEFAULTS)
        good, _ = parse(write("rows.jsonl", jsonl({"prompt": "a"}, {"prompt": "b"})), DEFAULTS)
        assert bad == good[1:]
