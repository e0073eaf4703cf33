"""Which models are offered, what each of them can do, and that one of them is in memory."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attnswap.accel.errors import UnsupportedModel, WeightsError
from attnswap.demo.server.shelf import Offer, Shelf
from attnswap.pipelines import load
from attnswap.pipelines.errors import BadInput, JobFailed
from attnswap.pipelines.job import Job


def labels(shelf: Shelf) -> list[str]:
    return [offer.label for offer in shelf.offers]


class TestWhatIsOffered:
    def test_all_that_come_with_attnswap_the_usual_one_first(self) -> None:
        assert labels(Shelf()) == ["emoji-sd", "emoji-flux", "emoji-video"]

    def test_what_the_operator_names_comes_before_them(self, tiny_sd: Path) -> None:
        assert labels(Shelf(["emoji-video", str(tiny_sd)])) == ["emoji-video", "tiny-sd", "emoji-sd", "emoji-flux"]

    def test_two_folders_of_one_name_are_told_apart_by_those_they_are_in(self, tiny_sd: Path, tmp_path: Path) -> None:
        folders = [shutil.copytree(tiny_sd, tmp_path / place / "sd") for place in ("one/same", "two/same", "other")]
        shelf = Shelf([str(folder) for folder in folders])
        assert labels(shelf)[:3] == ["one/same/sd", "two/same/sd", "other/sd"]
        assert [shelf.offer(label).model.folder for label in labels(shelf)[:3]] == folders

    def test_a_folder_that_is_called_like_a_bundled_model_is_told_apart(self, tiny_sd: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(tiny_sd, tmp_path / "mine" / "emoji-sd")
        assert labels(Shelf([str(folder)]))[:2] == ["mine/emoji-sd", "emoji-sd"]

    def test_a_folder_given_twice_is_offered_once(self, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tiny_sd.parent)
        offered = labels(Shelf([str(tiny_sd), "tiny-sd", "./tiny-sd/"]))
        assert offered == ["tiny-sd", "emoji-sd", "emoji-flux", "emoji-video"]

    def test_anything_else_is_refused_and_not_looked_up(self, tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shelf = Shelf()
        for name in ("find", "_local"):
            monkeypatch.setattr(load, name, lambda *_, **__: pytest.fail("it was looked up"))
        with pytest.raises(BadInput, match="there is emoji-sd, emoji-flux, emoji-video"):
            shelf.offer(str(tiny_sd))
        assert shelf.of_record(str(tiny_sd)) is None

    def test_a_recorded_name_is_the_label_or_what_the_operator_gave(self, tiny_sd: Path) -> None:
        shelf = Shelf([str(tiny_sd)])
        offer = shelf.offer("tiny-sd")
        assert shelf.of_record("tiny-sd") is offer
        assert shelf.of_record(str(tiny_sd)) is offer
        assert shelf.of_record("emoji-sd") is shelf.offer("emoji-sd")


class TestWhatIsRefusedAtTheStart:
    def test_a_pickle(self, tmp_path: Path) -> None:
        (tmp_path / "model.ckpt").write_bytes(b"")
        with pytest.raises(BadInput, match="pickle"):
            Shelf([str(tmp_path / "model.ckpt")])

    def test_a_folder_without_a_pipeline(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedModel, match="no pipeline folder"):
            Shelf([str(tmp_path)])

    def test_a_model_that_cannot_be_built(self, tiny_sd: Path, copy_of: Callable[[Path], Path]) -> None:
        model = copy_of(tiny_sd)
        (model / "unet" / "config.json").unlink()
        with pytest.raises(UnsupportedModel, match=r"no config\.json"):
            Shelf([str(model)])

    def test_a_model_that_makes_nothing_from_a_prompt(self, tiny_sd: Path, copy_of: Callable[[Path], Path]) -> None:
        model = copy_of(tiny_sd)
        index = json.loads((model / "model_index.json").read_text())
        index["_class_name"] = "StableDiffusionInpaintPipeline"
        (model / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(BadInput, match="mask to begin with"):
            Shelf([str(model)])

    def test_a_device_that_is_not_there(self) -> None:
        with pytest.raises(BadInput, match="--device"):
            Shelf(job=Job("", device="cuda:99"))

    def test_offloading_to_where_everything_is_already(self) -> None:
        with pytest.raises(BadInput, match="CPU already"):
            Shelf(job=Job("", device="cpu", cpu_offload="model"))

    def test_weights_that_are_not_here(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match="nobody/nothing"):
            Shelf(weights=["nobody/nothing"])
        (tmp_path / "weights.bin").write_bytes(b"")
        with pytest.raises(WeightsError, match="pickles"):
            Shelf(weights=[str(tmp_path / "weights.bin")])

    def test_weights_that_are_here_are_offered(self, tmp_path: Path) -> None:
        assert Shelf(weights=["emoji-sd", str(tmp_path)]).weights == ("emoji-sd", str(tmp_path))


class TestWhatAModelCanDo:
    def test_a_model_of_pictures(self, shelf: Shelf) -> None:
        offer = shelf.offer("emoji-sd")
        native = offer.native
        assert (native.width, native.height, native.steps, native.guidance, native.frames) == (64, 64, 12, 2.0, None)
        assert (offer.clips, offer.multiple, offer.takes_negative) == (False, 8, True)
        assert (offer.takes_picture, offer.needs_picture) == (True, False)
        assert offer.routes == ("direct", "ladder", "superres", "superres-ladder")

    def test_a_model_of_clips(self, shelf: Shelf) -> None:
        offer = shelf.offer("emoji-video")
        native = offer.native
        assert (native.width, native.height, native.frames, native.fps) == (96, 96, 17, 8)
        assert (offer.clips, offer.multiple) == (True, 8)
        assert (offer.takes_picture, offer.needs_picture) == (False, False)
        assert offer.routes == ("direct", "windows")

    @pytest.mark.parametrize(
        ("model", "methods"),
        [
            ("emoji-sd", ("dense", "auto", "hidiffusion", "linfusion", "hidiffusion+linfusion")),
            ("emoji-flux", ("dense", "auto", "adaspa", "clear")),
            ("emoji-video", ("dense", "auto", "adaspa")),
        ],
    )
    def test_methods_that_apply_then_those_that_go_together(
        self, shelf: Shelf, model: str, methods: tuple[str, ...]
    ) -> None:
        assert shelf.offer(model).methods == methods

    def test_of_the_others_it_is_said_why_in_a_line(self, shelf: Shelf) -> None:
        refusals = shelf.offer("emoji-sd").refusals
        assert set(refusals) == {"adaspa", "clear"}
        assert refusals["adaspa"].startswith("adaspa does not work on UNet2DConditionModel")
        assert all("\n" not in why for why in refusals.values())

    def test_every_choice_can_be_planned(self, shelf: Shelf) -> None:
        from attnswap.pipelines import task

        for offer in shelf.offers:
            for method in offer.methods:
                names = [] if method == "dense" else method.split("+")
                job = shelf.job(offer, prompt="a fox", methods={name: {} for name in names})
                task.plan(job, offer.model, offer.pipe, offer.preset, shelf.device)

    def test_a_model_that_begins_with_a_picture_is_offered_at_its_own_size(
        self, tiny_sd: Path, copy_of: Callable[[Path], Path]
    ) -> None:
        model = copy_of(tiny_sd)
        index = json.loads((model / "model_index.json").read_text())
        index["_class_name"] = "StableDiffusionImg2ImgPipeline"
        (model / "model_index.json").write_text(json.dumps(index))
        offer = Shelf([str(model)]).offers[0]
        assert (offer.takes_picture, offer.needs_picture) == (True, True)
        assert (offer.native.width, offer.native.height, offer.native.image) == (64, 64, None)
        assert offer.routes == ("direct",)


class TestJobs:
    def test_what_the_operator_wants_goes_for_all(self, tiny_sd: Path) -> None:
        shelf = Shelf([str(tiny_sd)], Job("", dtype="float32", low_memory=True))
        job = shelf.job(shelf.offers[0], prompt="a fox", steps=2)
        assert (job.prompt, job.model, job.steps) == ("a fox", "tiny-sd", 2)
        assert (job.dtype, job.low_memory) == ("float32", True)

    def test_no_picture_says_in_which_folder_its_model_is(self, tiny_sd: Path, tmp_path: Path) -> None:
        shelf = Shelf([str(tiny_sd)])
        offer = shelf.offers[0]
        job = shelf.job(offer, prompt="a fox", steps=1, output=tmp_path / "fox.png")
        [result] = shelf.session(offer).make([shelf.session(offer).plan(job)])
        shelf.close()
        assert str(tiny_sd.parent) not in json.dumps(result.record, default=str)
        assert result.record["model"] == "tiny-sd"


class TestMemory:
    def test_a_model_is_loaded_once_and_makes_room_for_the_next(self, tiny_sd: Path, tiny_flux: Path) -> None:
        shelf = Shelf([str(tiny_sd), str(tiny_flux)])
        first, second = shelf.offers[:2]
        session = shelf.session(first)
        assert shelf.session(first) is session
        unet = weakref.ref(session.pipe.unet)
        del session
        loaded: list[bool] = []
        real = load.load

        def watched(*arguments: Any, **named: Any) -> Any:
            loaded.append(unet() is None)
            return real(*arguments, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(load, "load", watched)
            shelf.session(second)
        assert loaded == [True]
        shelf.close()

    def test_one_that_cannot_be_loaded_leaves_none_and_the_next_can(
        self, tiny_sd: Path, copy_of: Callable[[Path], Path]
    ) -> None:
        damaged = copy_of(tiny_sd)
        next((damaged / "unet").glob("*.safetensors")).write_bytes(b"no weights")
        shelf = Shelf([str(damaged), str(tiny_sd)])
        with pytest.raises(JobFailed, match=f"{damaged.name} could not be loaded") as said:
            shelf.session(shelf.offers[0])
        assert str(damaged.parent) not in str(said.value).partition(":")[0]
        assert shelf.session(shelf.offers[1]).model.name == "tiny-sd"
        shelf.close()


def test_many_models_cost_little_before_somebody_asks(tiny_sd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bundled ones are known to work; nothing of them is built when the server begins."""
    monkeypatch.setattr(Offer, "pipe", property(lambda self: pytest.fail("built")))
    Shelf()
