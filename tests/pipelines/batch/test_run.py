"""Every row is made once, whatever happens to one of them; what is finished and whole is never made again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attnswap.pipelines import generate, job, save
from attnswap.pipelines.batch.claims import Lease
from attnswap.pipelines.batch.journal import Journal
from attnswap.pipelines.batch.run import Outcome, run
from attnswap.pipelines.batch.share import Share
from attnswap.pipelines.errors import BadInput
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image

Make = Callable[..., Any]
Entries = Callable[[], list[dict[str, Any]]]
Whole = Callable[[Iterable[str]], None]
FOUR = ("a fox", "a cat", "a dog", "a cow")
IDS = ("0001", "0002", "0003", "0004")


def failing(monkeypatch: pytest.MonkeyPatch, error: Callable[[torch.Tensor], Exception | None]) -> None:
    """The denoiser raises what `error` gives for a sample."""
    forward = UNet2DConditionModel.forward

    def sometimes(self: Any, sample: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if (raised := error(sample)) is not None:
            raise raised
        return forward(self, sample, *rest, **named)

    monkeypatch.setattr(UNet2DConditionModel, "forward", sometimes)


def written(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}


class TestRows:
    def test_each_is_made_with_an_entry_that_says_what_became_of_it(
        self, batch: Make, out: Path, entries: Entries, assert_whole: Whole
    ) -> None:
        fox = {"prompt": "a fox", "width": 128, "height": 128, "method": "hidiffusion", "id": "fox"}
        outcome = run(batch(fox, "a cat"))
        assert outcome == Outcome(rows=2, done=2)
        assert_whole(["fox", "0002"])
        first, second = entries()
        assert first["report"]["methods"] == ["hidiffusion"]
        assert second["report"] is None
        assert first["seconds"] > 0
        assert first["error"] is None
        assert "peak_bytes" in first
        assert (first["line"], second["line"]) == (1, 2)
        assert Image.open(out / "fox.png").size == (128, 128)

    def test_are_what_generate_makes_of_them(self, batch: Make, out: Path, tiny_sd: Path, tmp_path: Path) -> None:
        run(batch({"prompt": "a fox", "seed": 7, "negative": "a dog"}, "a cat"))
        alone = tmp_path / "alone.png"
        generate.generate(
            job.Job("a fox", model=str(tiny_sd), steps=1, seed=7, negative="a dog", output=alone, device="cpu")
        )
        assert np.array_equal(np.asarray(Image.open(alone)), np.asarray(Image.open(out / "0001.png")))

    def test_say_themselves_how_far_the_batch_is(self, batch: Make) -> None:
        said: list[str] = []
        run(batch("a fox", "a cat"), print_line=said.append)
        assert said[0].endswith("tiny-sd …")
        assert said[1].startswith("[1/2] 0001: ")
        assert " left" in said[1]
        assert said[2].startswith("[2/2] 0002: ")
        assert " left" not in said[2]

    def test_are_checked_to_the_last_before_the_first_is_made(self, batch: Make, out: Path, calls: Any) -> None:
        with pytest.raises(BadInput, match=r"rows.jsonl:3: width 100 .*\n1 line is wrong, 2 right"):
            run(batch("a fox", "a cat", {"prompt": "a dog", "width": 100}))
        assert not out.exists()
        assert calls == []

    def test_dry_run_makes_nothing_not_even_the_folder(self, batch: Make, out: Path) -> None:
        assert run(batch("a fox", dry_run=True)) == Outcome(rows=1)
        assert not out.exists()


class TestCompany:
    def test_rows_of_one_shape_share_a_call_and_others_do_not(
        self, batch: Make, calls: Any, assert_whole: Whole
    ) -> None:
        wide = {"prompt": "a fox", "width": 72}
        slow = {"prompt": "a fox", "steps": 2}
        other = {"prompt": "a fox", "method": "hidiffusion"}
        run(batch("a fox", wide, "a cat", slow, other, wide, "a dog", "a cow", batch_size=3))
        assert calls == [["0001", "0003", "0007"], ["0002", "0006"], ["0004"], ["0008"], ["0005"]]
        assert_whole([f"{number:04}" for number in range(1, 9)])

    def test_changes_a_picture_by_rounding_at_most_and_it_is_made_again_bit_for_bit(
        self, batch: Make, out: Path, entries: Entries, tmp_path: Path
    ) -> None:
        rows = [{"prompt": prompt, "seed": seed} for seed, prompt in enumerate(FOUR[:3])]
        run(batch(*rows, batch_size=3))
        assert [entry["batch"] for entry in entries()] == [3, 3, 3]
        together = {path.name: np.asarray(Image.open(path)).astype(int) for path in out.glob("*.png")}
        for name in together:
            fields = job.again(save.read_record(out / name), {})
            generate.generate(job.Job(**fields, output=tmp_path / name))
            assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
        shutil.rmtree(out)
        run(batch(*rows))
        for name, pixels in together.items():
            assert abs(np.asarray(Image.open(out / name)).astype(int) - pixels).max() <= 2

    def test_rows_that_go_by_stages_have_none(self, batch: Make, calls: Any, assert_whole: Whole) -> None:
        ladder = {"route": "ladder", "strengths": (0.5,), "width": 128, "height": 128, "steps": 2}
        run(batch("a fox", "a cat", fields=ladder, batch_size=2))
        assert calls == [["0001"], ["0002"]]
        assert_whole(IDS[:2])

    def test_clips_have_it_too(
        self, batch: Make, tiny_wan: Path, out: Path, calls: Any, entries: Entries, assert_whole: Whole
    ) -> None:
        pytest.importorskip("av")
        said: list[str] = []
        small = {"model": str(tiny_wan), "width": 16, "height": 16, "frames": 5}
        run(batch("a fox", "a cat", fields=small, batch_size=2), print_line=said.append)
        assert calls == [["0001", "0002"]]
        assert [entry["file"] for entry in entries()] == ["0001.mp4", "0002.mp4"]
        assert_whole(IDS[:2])
        assert said[1].startswith("[1/2] 0001: ")


class TestFailure:
    def test_of_one_in_a_call_leaves_the_others_made_alone(
        self, batch: Make, poison: None, calls: Any, entries: Entries, out: Path
    ) -> None:
        said: list[str] = []
        outcome = run(batch("a fox", "poison", "a cat", "a dog", batch_size=4), print_line=said.append)
        assert calls == [[*IDS], ["0001"], ["0002"], ["0003"], ["0004"]]
        assert (outcome.done, list(outcome.failures)) == (3, ["0002"])
        assert [(entry["id"], entry["status"]) for entry in entries()] == [
            ("0001", "done"), ("0002", "failed"), ("0003", "done"), ("0004", "done"),
        ]  # fmt: skip
        failed = entries()[1]
        assert "not-a-number in the latents after step 1" in failed["error"]
        assert "traceback" not in failed
        assert (failed["file"], failed["sha256"], failed["seconds"]) == (None, None, None)
        assert sorted(path.name for path in out.glob("*.png")) == ["0001.png", "0003.png", "0004.png"]
        assert "failed together, and are tried one by one" in said[1]
        assert [line[:5] for line in said[2:]] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]

    def test_does_not_change_what_comes_after_it(self, batch: Make, poison: None, out: Path) -> None:
        large = {"width": 128, "height": 128, "methods": {"hidiffusion": {}}}
        run(batch("poison", "a fox", fields=large))
        after = (out / "0002.png").read_bytes()
        shutil.rmtree(out)
        run(batch("a dog", "a fox", fields=large))
        assert (out / "0002.png").read_bytes() == after

    def test_out_of_memory_is_recorded_with_a_way_out(
        self, batch: Make, entries: Entries, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        full = torch.OutOfMemoryError("CUDA out of memory")
        failing(monkeypatch, lambda sample: full if sample.shape[-1] > 8 else None)
        outcome = run(batch("a fox", {"prompt": "a cat", "width": 96}, "a dog"))
        assert (outcome.done, list(outcome.failures)) == (2, ["0002"])
        assert "out of memory at 96x64" in entries()[1]["error"]
        assert "--vae-tiling" in entries()[1]["error"]

    def test_rows_that_do_not_fit_together_are_made_alone(
        self, batch: Make, calls: Any, assert_whole: Whole, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        full = torch.OutOfMemoryError("CUDA out of memory")
        failing(monkeypatch, lambda sample: full if len(sample) > 2 else None)
        assert run(batch(*FOUR[:3], batch_size=3)).failures == {}
        assert calls == [["0001", "0002", "0003"], ["0001"], ["0002"], ["0003"]]
        assert_whole(IDS[:3])

    def test_that_nobody_expected_is_recorded_with_its_traceback(
        self, batch: Make, entries: Entries, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failing(monkeypatch, lambda sample: ZeroDivisionError("surprise") if sample.shape[-1] > 8 else None)
        outcome = run(batch({"prompt": "a cat", "width": 96}, "a dog"))
        assert (outcome.done, outcome.failures) == (1, {"0001": "ZeroDivisionError: surprise"})
        assert "in sometimes" in entries()[0]["traceback"]

    def test_as_often_as_is_allowed_ends_the_batch(self, batch: Make, poison: None, calls: Any) -> None:
        outcome = run(batch("poison", "a fox", "poison", "a cat", "a dog", max_failures=2))
        assert (outcome.done, list(outcome.failures), outcome.left) == (1, ["0001", "0003"], 2)
        assert outcome.ended == "--max-failures 2 reached"
        assert len(calls) == 3

    def test_of_the_last_row_ends_nothing_early(self, batch: Make, poison: None) -> None:
        assert run(batch("a fox", "poison", max_failures=1)).ended is None

    def test_of_the_device_ends_the_batch(
        self, batch: Make, out: Path, calls: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        broken = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")
        failing(monkeypatch, lambda sample: broken)
        outcome = run(batch("a fox", "a cat"))
        assert outcome.ended == "the device has failed: CUDA error: an illegal memory access was encountered"
        assert (outcome.left, len(calls)) == (2, 1)
        assert not (out / "results.jsonl").exists()

    def test_a_picture_that_is_gone_by_then(self, batch: Make, entries: Entries, tmp_path: Path, calls: Any) -> None:
        Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
        given = batch("a fox", {"prompt": "a cat", "image": "red.png", "strength": 1.0})
        outcome = run(given, print_line=lambda text: (tmp_path / "red.png").unlink(missing_ok=True))
        assert (outcome.done, list(outcome.failures)) == (1, ["0002"])
        assert "red.png" in entries()[1]["error"]


class TestResume:
    def test_makes_nothing_again_that_is_finished_and_whole(
        self, batch: Make, out: Path, calls: Any, assert_whole: Whole
    ) -> None:
        run(batch(*FOUR[:2]))
        before = written(out)
        assert run(batch(*FOUR, resume=True)) == Outcome(rows=4, before=2, done=2)
        assert calls[2:] == [["0003"], ["0004"]]
        assert written(out).items() >= before.items()
        assert_whole(IDS)
        assert run(batch(resume=True)) == Outcome(rows=4, before=4)

    def test_makes_again_what_is_gone_damaged_changed_or_failed_and_says_so(
        self, batch: Make, out: Path, calls: Any, assert_whole: Whole, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as broken:
            failing(broken, lambda sample: ZeroDivisionError("surprise") if sample.shape[-1] == 9 else None)
            run(batch(*FOUR, {"prompt": "a hen", "width": 72}))
        (out / "0001.png").unlink()
        (out / "0002.png").write_bytes((out / "0002.png").read_bytes()[:-100])
        said: list[str] = []
        calls.clear()
        changed = {"prompt": "a dog", "seed": 5}
        given = batch("a fox", "a cat", changed, "a cow", {"prompt": "a hen", "width": 72}, resume=True)
        outcome = run(given, print_line=said.append)
        assert outcome == Outcome(rows=5, before=1, done=4)
        assert calls == [["0001"], ["0002"], ["0003"], ["0005"]]
        assert_whole([*IDS, "0005"])
        assert said[:4] == [
            "1 row made again, failed before: 0005.",
            "1 row made again, asked for something else: 0003.",
            "1 row made again, whose file is gone: 0001.",
            "1 row made again, whose file is not what was written: 0002.",
        ]

    def test_keeps_no_picture_whose_row_has_moved(
        self, batch: Make, tmp_path: Path, out: Path, assert_whole: Whole
    ) -> None:
        lines = ["a fox", "a cat", "a dog"]
        manifest = tmp_path / "rows.txt"

        def given(**options: Any) -> Any:
            manifest.write_text("\n".join(lines))
            return replace(batch(**options), manifest=manifest)

        run(given())
        lines.insert(1, "a cow")
        assert run(given(resume=True)).before == 1
        assert_whole(IDS)
        prompts = [save.read_record(out / f"{name}.png")["prompt"] for name in IDS]
        assert prompts == lines

    def test_leaves_rows_that_the_manifest_no_longer_has(
        self, batch: Make, entries: Entries, assert_whole: Whole
    ) -> None:
        run(batch({"prompt": "a fox", "id": "fox"}, {"prompt": "a cat", "id": "cat"}))
        said: list[str] = []
        run(batch({"prompt": "a cat", "id": "cat"}, resume=True), print_line=said.append)
        assert said == ["1 row of an earlier run, not in this manifest, left as they are: fox."]
        assert_whole(["cat", "fox"])

    def test_notices_a_model_of_another_content(
        self, batch: Make, tiny_sd: Path, copy_of: Callable[[Path], Path], calls: Any
    ) -> None:
        model = copy_of(tiny_sd)
        run(batch("a fox", fields={"model": str(model)}))
        weights = model / "unet" / "diffusion_pytorch_model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-4:] = b"\0\0\0\0"
        weights.write_bytes(data)
        assert run(batch(resume=True, fields={"model": str(model)})) == Outcome(rows=1, done=1)

    def test_is_needed_where_there_are_results(self, batch: Make, out: Path) -> None:
        run(batch(*FOUR[:2]))
        before = written(out)
        with pytest.raises(BadInput, match=r"holds 2 of these 4 rows already \(0001, 0002\): go on with --resume"):
            run(batch(*FOUR))
        assert written(out) == before

    @pytest.mark.parametrize("options", [{}, {"resume": True}, {"share": Share(claim=True, worker="a")}])
    def test_never_overwrites_what_somebody_else_has_made(self, batch: Make, out: Path, options: Any) -> None:
        out.mkdir()
        Image.new("RGB", (8, 8)).save(out / "0001.png")
        before = (out / "0001.png").read_bytes()
        with pytest.raises(BadInput, match=r"holds .*0001"):
            run(batch("a fox", **options))
        assert (out / "0001.png").read_bytes() == before

    def test_merges_what_a_killed_worker_could_not(self, batch: Make, out: Path, assert_whole: Whole) -> None:
        run(batch(*FOUR[:2], share=Share(0, 2, worker="0-of-2")))
        run(batch(share=Share(1, 2, worker="1-of-2")))
        (out / "results.jsonl").unlink()
        assert run(batch(share=Share(1, 2, worker="1-of-2"), resume=True)).done == 0
        assert_whole(IDS[:2])


class TestTakenOver:
    """By a batch that took this one for dead, as it was suspended."""

    ENDED = "another batch has taken over this folder"

    @pytest.fixture(autouse=True)
    def no_merge(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Journal, "merge", lambda *_: pytest.fail("what the other writes is replaced"))

    def take_over(self, out: Path) -> None:
        (out / ".attnswap-locks" / "single.batch.1").touch()

    def test_between_rows_makes_no_other(self, batch: Make, out: Path, calls: Any) -> None:
        def say(text: str) -> None:
            if "0001: " in text:
                self.take_over(out)

        outcome = run(batch("a fox", "a cat"), print_line=say)
        assert (outcome.ended, outcome.done, outcome.left) == (self.ENDED, 1, 1)
        assert calls == [["0001"]]

    @pytest.mark.parametrize("moment", [(UNet2DConditionModel, "forward"), (AutoencoderKL, "decode")])
    def test_within_a_row_writes_no_file(
        self, batch: Make, out: Path, monkeypatch: pytest.MonkeyPatch, moment: tuple[Any, str]
    ) -> None:
        function = getattr(*moment)

        def suspended(*arguments: Any, **named: Any) -> Any:
            self.take_over(out)
            return function(*arguments, **named)

        monkeypatch.setattr(*moment, suspended)
        outcome = run(batch("a fox", fields={"steps": 2}))
        assert (outcome.ended, outcome.failures, outcome.left) == (self.ENDED, {}, 1)
        assert os.listdir(out) == [".attnswap-locks"]

    def test_within_a_clip_writes_no_file(
        self, batch: Make, tiny_wan: Path, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("av")
        from attnswap.pipelines import video_writer

        add = video_writer._Mp4.add

        def suspended(self_: Any, frame: Any) -> None:
            self.take_over(out)
            add(self_, frame)

        monkeypatch.setattr(video_writer._Mp4, "add", suspended)
        small = {"model": str(tiny_wan), "width": 16, "height": 16, "frames": 5}
        assert run(batch("a fox", fields=small)).ended == self.ENDED
        assert os.listdir(out) == [".attnswap-locks"]

    def test_after_a_file_is_written_makes_no_entry(
        self, batch: Make, out: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write = save.write_png

        def suspended(*arguments: Any) -> None:
            write(*arguments)
            self.take_over(out)

        monkeypatch.setattr(save, "write_png", suspended)
        outcome = run(batch("a fox"))
        assert (outcome.ended, outcome.done) == (self.ENDED, 0)
        assert not (out / "results.jsonl").exists()

    def test_is_not_known_where_the_folder_cannot_be_read(self, batch: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(self: Any) -> bool:
            raise OSError(5, "Input/output error")

        def step(sample: torch.Tensor) -> None:
            monkeypatch.setattr(Lease, "taken_over", broken)

        failing(monkeypatch, step)
        outcome = run(batch("a fox"))
        assert (outcome.failures, outcome.left) == ({}, 1)
        assert str(outcome.ended).endswith("out cannot be read any more: Input/output error")


class TestStop:
    def test_ends_within_the_step_and_the_row_is_made_later(
        self, batch: Make, entries: Entries, assert_whole: Whole, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[int] = []
        forward = UNet2DConditionModel.forward

        def counted(*arguments: Any, **named: Any) -> Any:
            steps.append(1)
            return forward(*arguments, **named)

        monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
        given = batch(*FOUR[:3], fields={"steps": 3})
        outcome = run(given, stopping=nullcontext(lambda: len(steps) >= 5))
        assert (outcome.done, outcome.left, outcome.interrupted) == (1, 2, True)
        assert outcome.ended == "interrupted"
        assert len(steps) == 5
        assert_whole(["0001"])
        assert run(replace(given, resume=True)).done == 2
        assert_whole(IDS[:3])

    def test_keeps_a_picture_that_is_finished_but_for_its_file(
        self, batch: Make, assert_whole: Whole, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decoded: list[int] = []
        decode = AutoencoderKL.decode

        def noted(*arguments: Any, **named: Any) -> Any:
            decoded.append(1)
            return decode(*arguments, **named)

        monkeypatch.setattr(AutoencoderKL, "decode", noted)
        outcome = run(batch("a fox", "a cat"), stopping=nullcontext(lambda: bool(decoded)))
        assert (outcome.done, outcome.left, outcome.interrupted) == (1, 1, True)
        assert_whole(["0001"])
