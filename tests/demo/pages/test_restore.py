"""Restored and made again: the same pixels; and what cannot be restored is said."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
from attnswap.demo.forms.job_form import JobForm
from attnswap.demo.forms.reading import plain
from attnswap.demo.pages import restore
from attnswap.demo.server.shelf import Shelf
from attnswap.demo.server.visitors import Visitor
from attnswap.demo.site import Site
from attnswap.pipelines import save
from attnswap.pipelines.errors import BadInput
from PIL import Image

from .entries import make, make_job, value

Forms = tuple[JobForm, JobForm]

JOBS: dict[str, dict[str, Any]] = {
    "picture": {"prompt": "an owl", "negative": "blue", "seed": 7, "steps": 3, "guidance": 3.5},
    "settings": {"width": 128, "height": 192, "methods": {"hidiffusion": {"t1": 0.25, "windows": (1, 2)}}},
    "two methods": {"width": 128, "height": 128, "methods": {"hidiffusion": {"shift": "layer"}, "linfusion": {}}},
    "auto": {"width": 128, "height": 128, "methods": {"auto": {}}},
    "route": {"width": 128, "height": 128, "route": "ladder", "steps": 12},
    "flux": {"model": "emoji-flux", "methods": {"clear": {}}},
    "clip": {"model": "emoji-video", "frames": 9, "methods": {"adaspa": {"sparsity": 0.7}}, "steps": 4},
    "long clip": {"model": "emoji-video", "frames": 21, "route": "windows", "overlap": 4},
}


@pytest.fixture
def forms(site: Site) -> Iterator[Forms]:
    with gr.Blocks(analytics_enabled=False):
        yield JobForm(site, clips=False, elem="image"), JobForm(site, clips=True, elem="video")


@pytest.fixture
def visitor(uploads: Path) -> Visitor:
    return Visitor("me", uploads)


def values(form: JobForm, updates: Any) -> list[Any]:
    """What the controls of a form hold after they were updated."""
    return [value(update) for update in updates]


def bits(file: Path) -> Any:
    """Of a picture or of all frames of a clip."""
    if file.suffix == ".mp4":
        with save.open_mp4(file) as container:
            return np.stack([frame.to_ndarray() for frame in container.decode(video=0)])
    return np.asarray(Image.open(file))


@pytest.mark.parametrize("name", JOBS)
def test_what_is_restored_and_made_again_has_the_same_pixels(
    name: str, forms: Forms, shelf: Shelf, visitor: Visitor
) -> None:
    first = make(shelf, visitor, **JOBS[name])
    found = restore.restored(restore.record_of(str(first.file)), *forms)
    assert found.remarks == []
    assert found.clip == first.clip
    image, video = forms
    own = found.updates[len(image.inputs) :] if found.clip else found.updates[: len(image.inputs)]
    form = video if found.clip else image
    offer, job = form.job(values(form, own), visitor)
    assert job.prompt == first.result.record["prompt"]
    again = make_job(shelf, visitor, dataclasses.replace(job, model=offer.label))
    assert again.file != first.file
    assert np.array_equal(bits(again.file), bits(first.file))


def test_the_other_form_stays_as_it_is(forms: Forms, shelf: Shelf, visitor: Visitor) -> None:
    record = make(shelf, visitor, steps=1).result.record
    image, video = forms
    found = restore.restored(record, *forms)
    assert list(found.updates[len(image.inputs) :]) == [gr.skip()] * len(video.inputs)
    clip = restore.restored({**record, "model": "emoji-video", "frames": 9, "fps": "8"}, *forms)
    assert list(clip.updates[: len(image.inputs)]) == [gr.skip()] * len(image.inputs)
    assert len(clip.updates) == len(found.updates) == len(image.inputs) + len(video.inputs)


class TestWhatIsSaid:
    def test_names_the_page(self) -> None:
        assert restore.Restored(True, [], []).said("a.mp4") == "All settings of a.mp4 are on the Video page."
        assert restore.Restored(False, [], []).said("number 3") == "All settings of number 3 are on the Image page."

    def test_lists_what_could_not_be_restored(self) -> None:
        said = restore.Restored(False, [], ["its LoRA <x> is not here", "the seed"]).said("a.png")
        assert said.splitlines()[0] == "The settings of a.png are on the Image page, but not all of them:"
        assert said.splitlines()[2:] == [f"- {plain('its LoRA <x> is not here')}", "- the seed"]

    def test_of_a_model_that_is_not_offered(self, forms: Forms, shelf: Shelf, visitor: Visitor) -> None:
        record = {**make(shelf, visitor, steps=1).result.record, "model": "/secret/models/mine"}
        found = restore.restored(record, *forms)
        assert any("not offered" in remark for remark in found.remarks)
        assert "secret" not in found.said("a.png"), "folders are nobody's business"


class TestWhatIsNotRestored:
    def picture(self, folder: Path, record: Any) -> str:
        file = folder / "file.png"
        image = Image.new("RGB", (8, 8))
        if record is None:
            image.save(file)
        else:
            save.write_png(image, file, record)
        return str(file)

    @pytest.mark.parametrize(
        ("record", "said"),
        [
            (None, "has no attnswap metadata"),
            ({"compare": {"variants": []}}, "file.png is a comparison; any one of its pictures or clips will do"),
            ({"prompt": "a fox"}, "does not say how"),
            ({"prompt": 3}, "does not say how"),
        ],
        ids=["foreign", "comparison", "incomplete", "damaged"],
    )
    def test_is_said_in_one_line(self, uploads: Path, record: Any, said: str) -> None:
        path = self.picture(uploads, record)
        with pytest.raises(BadInput) as caught:
            restore.record_of(path)
        message = str(caught.value)
        assert message.startswith("Nothing to restore: ")
        assert said in message
        assert "\n" not in message
        assert str(uploads) not in message

    def test_is_a_file_that_nobody_has_uploaded(self, tmp_path: Path) -> None:
        path = self.picture(tmp_path, json.loads("{}"))
        with pytest.raises(BadInput, match="was not uploaded here"):
            restore.record_of(path)


def test_a_prompt_longer_than_this_server_takes_is_not_restored(forms: Forms, site: Site) -> None:
    job = site.shelf.job(site.shelf.offer("emoji-sd"), prompt="x" * 201)
    with pytest.raises(BadInput, match="the prompt has 201 characters; this server allows 200"):
        restore.restored(job.to_record(), *forms)
