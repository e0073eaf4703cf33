"""`attnswap show`: what a file says of itself, on one screen, whoever wrote it."""

from __future__ import annotations

import json
import unicodedata
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnswap.accel.errors import AttnswapWarning
from attnswap.accel.methods import AdaSpa, HiDiffusion
from attnswap.cli import common
from attnswap.pipelines import save, video_writer
from attnswap.pipelines.job import Companions, Job
from attnswap.pipelines.lora import Lora
from PIL import Image

from .test_cli import Cli, attnswap, refused

__all__ = ["attnswap"]  # a fixture

JOB = Job(prompt="a fox", steps=12, guidance=7.5, seed=3, width=256, height=192, dtype="float32")
SURROUNDINGS = {
    "device": "cuda:0",
    "device_name": "NVIDIA H200",
    "threads": None,
    "backend": "auto",
    "versions": {"attnswap": "0.1.0", "torch": "2.13.0"},
    "fingerprints": {"model": "9f1a7bd0904749a9"},
}
NOTHING = "\x1b]0;title\x07\x1b[2Jgone\x9b31m\u202eturned\u2028\r\x7f"


def write(name: str, job: Job = JOB, /, **more: Any) -> dict[str, Any]:
    """A file with the record of `job`, and that record."""
    record = job.to_record() | SURROUNDINGS | more
    if name.endswith(".png"):
        save.write_png(Image.new("RGB", (16, 16)), Path(name), record)
        return record
    with video_writer.writers(Path(name), None, fps=Fraction(8), record=record) as (writer,):
        writer.add(np.zeros((16, 16, 3), np.uint8))
    return record


def rows(out: str) -> dict[str, str]:
    """Label → text, of a screen."""
    found: dict[str, str] = {}
    for line in out.splitlines():
        label = line[:11].strip() or list(found)[-1]
        found[label] = f"{found.get(label, '')} {line[11:]}".strip()
    return found


class TestShow:
    def test_tells_what_is_needed_to_make_it_again(self, attnswap: Cli) -> None:
        write("fox.png")
        status, out, err = attnswap("show", "fox.png")
        assert (status, err) == (0, "")
        assert rows(out) == {
            "prompt": "a fox",
            "model": "emoji-sd, float32",
            "size": "256x192",
            "steps": "12, guidance 7.5, seed 3",
            "method": "none, dense attention",
            "made on": "cuda:0, NVIDIA H200",
            "versions": "attnswap 0.1.0, torch 2.13.0",
            "again": "attnswap generate --from fox.png",
        }

    def test_tells_all_that_was_asked_for(self, attnswap: Cli) -> None:
        job = Job(
            prompt="a fox",
            negative="blurry",
            variant="fp16",
            dtype="float16",
            image=Path("in.png"),
            strength=0.6,
            loras=(Lora("style.safetensors", 0.8), Lora("me/styles", 1.0, "b.safetensors")),
            scheduler="DDIMScheduler",
            route="ladder",
            strengths=(0.4, 0.3),
            vae_tiling=True,
            compile=True,
            batch=Companions(1, (("a", None, 1), ("a fox", None, 2), ("b", None, 3))),
        )
        write("fox.png", job, device="cpu", device_name="6502", threads=4, backend="eager")
        found = rows(attnswap("show", "fox.png")[1])
        assert found["negative"] == "blurry"
        assert found["model"] == "emoji-sd, variant fp16, float16"
        assert found["image"] == "in.png, strength 0.6"
        assert found["LoRA"] == "style.safetensors, scale 0.8 and me/styles, b.safetensors, scale 1.0"
        assert found["scheduler"] == "DDIMScheduler"
        assert found["route"] == "ladder, strengths 0.4,0.3"
        assert found["memory"] == "decoded in tiles, compiled"
        assert found["batch"] == "made in a batch of 3, as number 2"
        assert found["made on"] == "cpu, 6502, 4 threads, ATTNSWAP_BACKEND=eager"

    def test_tells_the_settings_that_are_not_the_default(self, attnswap: Cli) -> None:
        methods = {"hidiffusion": HiDiffusion(t1=0.4, windows=(4, 2), window_attention=False), "adaspa": AdaSpa()}
        write("fox.png", Job("a fox", methods={name: config.to_dict() for name, config in methods.items()}))
        method = rows(attnswap("show", "fox.png")[1])["method"]
        assert method == "hidiffusion (window_attention=false, windows=4,2, t1=0.4) and adaspa"

    def test_tells_that_the_method_was_chosen(self, attnswap: Cli) -> None:
        write("fox.png", asked=Job("a fox", methods={"auto": {}}).to_record())
        assert rows(attnswap("show", "fox.png")[1])["method"] == "none, dense attention, chosen by auto"

    @pytest.mark.parametrize("kind", ["gif", "mp4"])
    def test_tells_how_long_a_clip_is(self, attnswap: Cli, kind: str) -> None:
        if kind == "mp4":
            pytest.importorskip("av")
        write(f"fox.{kind}", Job("a fox", frames=49, fps=Fraction(24000, 1001), route="windows", window=17, overlap=8))
        found = rows(attnswap("show", f"fox.{kind}")[1])
        assert found["size"] == "49 frames at 24000/1001 a second (2.0 s)"
        assert found["route"] == "windows, 17 frames in a window, 8 of them shared with the one before"

    def test_tells_which_stage_a_picture_is(self, attnswap: Cli) -> None:
        record = JOB.to_record() | SURROUNDINGS
        save.write_png(Image.new("RGB", (8, 8)), Path("1.png"), {"stage": 1, "job": record, "carried": {}})
        found = rows(attnswap("show", "1.png")[1])
        assert (found["stage"], found["prompt"]) == ("the picture after stage 1 of this:", "a fox")

    @pytest.mark.parametrize("columns", [50, 80, 200])
    def test_is_one_screen(self, attnswap: Cli, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", str(columns))
        write("fox.png", Job("a fox " * 2000, negative="blurry " * 2000, batch=Companions(0, (("a", None, 1),))))
        lines = attnswap("show", "fox.png")[1].splitlines()
        assert max(map(len, lines)) <= min(columns, 100)
        assert len(lines) <= 2 * 500 / 25 + 20

    def test_cuts_a_long_prompt_and_says_so(self, attnswap: Cli) -> None:
        record = write("fox.png", Job("0123456789" * 1024))
        prompt = rows(attnswap("show", "fox.png")[1])["prompt"]
        assert prompt.endswith("… (10240 characters; all of it with --json)")
        assert prompt.replace(" ", "").startswith("0123456789" * 50 + "…")
        assert json.loads(attnswap("show", "fox.png", "--json")[1])["prompt"] == record["prompt"]

    def test_quotes_a_name_for_the_shell(self, attnswap: Cli) -> None:
        write("my fox's.png")
        assert attnswap("show", "my fox's.png")[1].endswith("""attnswap generate --from 'my fox'"'"'s.png'\n""")

    def test_names_a_file_that_looks_like_a_flag_so_that_it_is_none(self, attnswap: Cli) -> None:
        write("-my fox.png")
        assert attnswap("show", "--", "-my fox.png")[1].endswith("attnswap generate --from='-my fox.png'\n")


class TestJson:
    def test_is_the_record(self, attnswap: Cli) -> None:
        record = write("fox.png", Job("ein Füchslein 🦊"))
        status, out, _ = attnswap("show", "fox.png", "--json")
        assert (status, json.loads(out)) == (0, record)
        assert "ein Füchslein 🦊" in out

    def test_of_several_files_is_by_their_names(self, attnswap: Cli) -> None:
        records = {name: write(name, Job(name)) for name in ("a.png", "b.gif")}
        assert json.loads(attnswap("show", "a.png", "b.gif", "--json")[1]) == records


class TestSeveralFiles:
    def test_are_each_under_their_name(self, attnswap: Cli) -> None:
        for name in ("a.png", "b.gif"):
            write(name)
        out = attnswap("show", "a.png", "b.gif")[1]
        first, second = out.split("\n\n")
        assert first.startswith("a.png\nprompt     a fox\n")
        assert second.startswith("b.gif\nprompt     a fox\n")

    @pytest.mark.parametrize("flags", [(), ("--json",)])
    def test_that_are_none_of_ours_do_not_hide_the_others(self, attnswap: Cli, flags: tuple[str, ...]) -> None:
        write("a.png")
        Image.new("RGB", (8, 8)).save("other.png")
        status, out, err = attnswap("show", "other.png", "a.png", "nothing.png", *flags)
        assert status == 2
        assert "a fox" in out
        assert err.splitlines() == [
            "attnswap: other.png does not say how it was made: it has no attnswap metadata.",
            "attnswap: nothing.png does not exist.",
        ]


class TestNotOurs:
    def test_is_wrong_use(self, attnswap: Cli) -> None:
        Image.new("RGB", (8, 8)).save("other.png")
        refused(attnswap("show", "other.png"), "other.png", "no attnswap metadata")
        refused(attnswap("show", "other.png", "--json"), "no attnswap metadata")
        refused(attnswap("show", "nothing.png"), "does not exist")

    @pytest.mark.parametrize("name", ["a.png", "a.gif", "a.mp4", "a.txt", "folder"])
    def test_nor_is_what_is_no_picture(self, attnswap: Cli, name: str) -> None:
        if name == "a.mp4":
            pytest.importorskip("av")
        if name == "folder":
            Path(name).mkdir()
        else:
            Path(name).write_text("no picture")
        refused(attnswap("show", name), "not a readable")


class TestRecordsOfAnybody:
    @pytest.mark.parametrize("flags", [(), ("--json",)])
    def test_do_not_steer_the_terminal(self, attnswap: Cli, flags: tuple[str, ...]) -> None:
        wild = dict.fromkeys((*JOB.to_record(), *SURROUNDINGS), NOTHING)
        company = {"index": 0, "of": [NOTHING]}
        methods = {NOTHING: {NOTHING: [NOTHING]}}
        nested = {"methods": methods, "versions": {NOTHING: NOTHING}, "loras": [{"id": NOTHING, "scale": NOTHING}]}
        write("evil.png", **(wild | nested | {"batch": company}))
        _, out, _ = attnswap("show", "evil.png", *flags)
        assert not [character for character in out if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Cs")
                    and character != "\n"]  # fmt: skip
        assert "gone" in out
        if flags:
            assert json.loads(out)["prompt"] == NOTHING
        else:
            assert rows(out)["prompt"].startswith(r"\x1b]0;title\x07\x1b[2Jgone\x9b31m\u202eturned\u2028\r\x7f")

    def test_nor_does_the_name_of_a_file(self, attnswap: Cli) -> None:
        write("\x1b[2J.png")
        write("b.png")
        assert "\x1b" not in attnswap("show", "\x1b[2J.png", "b.png")[1]

    @pytest.mark.parametrize("said", [
        {"model": "\x1b[31mme/model"},
        {"image": "\x1b[31m.png", "strength": 0.5},
        {"scheduler": "\x1b[31m"},
        {"route": "\x1b[31m"},
        {"loras": [{"id": "a.safetensors", "\x1b[31m": 1}]},
    ])  # fmt: skip
    def test_nor_do_they_when_they_are_refused(self, attnswap: Cli, said: dict[str, Any]) -> None:
        write("evil.png", **said)
        status, _, err = attnswap("generate", "--from", "evil.png")
        assert status == 2
        assert "\x1b" not in err
        assert r"\x1b[31m" in err

    def test_nor_in_warnings(self, capsys: pytest.CaptureFixture[str]) -> None:
        with common.warnings_in_a_line():
            warnings.warn("layer \x1b[31m\nlayer 2", AttnswapWarning, stacklevel=1)
        assert capsys.readouterr().err == "layer \\x1b[31m\nlayer 2\n"

    def test_nor_in_messages_of_several_lines(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert common.fail("rows.jsonl:1: \x1b[31m\nrows.jsonl:2: \u202e", 2) == 2
        assert capsys.readouterr().err == "attnswap: rows.jsonl:1: \\x1b[31m\nrows.jsonl:2: \\u202e\n"

    def test_keep_emoji_and_scripts_whole(self, attnswap: Cli) -> None:
        prompt = "👨‍👩‍👧 狐狸　می‌روم Füchslein"
        write("fox.png", Job(prompt))
        assert rows(attnswap("show", "fox.png")[1])["prompt"] == prompt

    @pytest.mark.parametrize("value", [None, True, 10**30, -1, 1.5, float("nan"), "x", [], [[], {}], {}, {"a": [{}]}])
    def test_of_any_type_are_shown_as_far_as_they_make_sense(self, attnswap: Cli, value: Any) -> None:
        names = [*JOB.to_record(), *SURROUNDINGS, "asked", "stage", "job"]
        write("odd.png", **dict.fromkeys(names, value))
        status, out, err = attnswap("show", "odd.png")
        assert (status, err) == (0, "")
        assert rows(out)["again"] == "attnswap generate --from odd.png"
        for name in names:
            write("odd.png", **{name: value})
            assert attnswap("show", "odd.png")[0] == 0

    def test_nested_too_deep_are_refused_in_a_line(self, attnswap: Cli) -> None:
        deep: list[Any] = []
        for _ in range(600):
            deep = [deep]
        write("deep.png", methods={"hidiffusion": {"windows": deep}})
        refused(attnswap("show", "deep.png"), "deep.png", "nested too deep")

    def test_of_an_earlier_version_are_shown(self, attnswap: Cli) -> None:
        save.write_png(Image.new("RGB", (8, 8)), Path("old.png"), {"prompt": "a fox", "seed": 1})
        assert rows(attnswap("show", "old.png")[1]) == {
            "prompt": "a fox",
            "steps": "seed 1",
            "again": "attnswap generate --from old.png",
        }
