"""A record put back into the controls: the same is made again, and what they cannot say is said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attnswap.demo.forms.job_form import JobForm
from attnswap.demo.server.visitors import Visitor
from attnswap.demo.site import Site
from attnswap.pipelines import fingerprints
from attnswap.pipelines.errors import BadInput
from PIL import Image

from .given import planned, updated, values_of


def back(form: JobForm, record: dict[str, Any]) -> tuple[list[Any], list[str]]:
    """The values that a page then shows, and the remarks."""
    updates, remarks = form.restored(record)
    return [update["value"] for update in updates], remarks


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"prompt": "a cat", "negative": "dogs", "seed": 5, "steps": 3, "guidance": 4.5},
        {"width": 128, "height": 192, "method": "hidiffusion", "hidiffusion_t1": "0.5", "hidiffusion_raunet": "no"},
        {"width": 128, "height": 128, "route": "ladder"},
        {"model": "emoji-flux", "method": "clear", "clear_weights": "none", "clear_radius": "5.0"},
        {"width": 256, "height": 256, "method": "auto"},
        {"method": "hidiffusion+linfusion", "width": 128},
    ],
)
def test_a_record_restores_what_was_asked_for(
    form: JobForm, visitor: Visitor, site: Site, given: dict[str, Any]
) -> None:
    values = values_of(form, **given)
    offer, job = form.job(values, visitor)
    record = planned(site, offer, job).record
    restored, remarks = back(form, record)
    assert remarks == []
    assert dict(zip(form.names, restored, strict=True)) == dict(zip(form.names, values, strict=True))
    again, same = form.job(restored, visitor)
    assert planned(site, again, same).record == record


def test_a_clip_is_restored(clip_form: JobForm, visitor: Visitor, site: Site) -> None:
    values = values_of(clip_form, frames=33, fps="24000/1001", route="windows", overlap=4, method="adaspa")
    offer, job = clip_form.job(values, visitor)
    restored, remarks = back(clip_form, planned(site, offer, job).record)
    assert remarks == []
    assert restored == values
    shown = updated(clip_form, clip_form.restored(planned(site, offer, job).record)[0])
    assert shown["window"]["visible"]


def test_pressing_the_button_again_makes_the_same_picture(form: JobForm, visitor: Visitor, site: Site) -> None:
    values = values_of(form, prompt="an owl", seed=3, steps=2, width=128, height=128, method="hidiffusion")
    offer, job = form.job(values, visitor)
    session = site.shelf.session(offer)
    pictures = []
    for number in range(2):
        output = visitor.folder / f"{number}.png"
        [result] = session.make([session.plan(dataclasses.replace(job, output=output))])
        pictures.append(Image.open(output).tobytes())
        restored, remarks = back(form, result.record)
        assert remarks == []
        offer, job = form.job(restored, visitor)
    assert pictures[0] == pictures[1]


def test_what_a_preset_has_filled_in_otherwise_since_is_given(form: JobForm, visitor: Visitor, site: Site) -> None:
    offer, job = form.job(values_of(form, method="hidiffusion"), visitor)
    record = planned(site, offer, job).record
    record["guidance"], record["steps"] = 3.5, 9
    record["methods"]["hidiffusion"]["t1"] = 0.25
    restored, _ = back(form, record)
    got = dict(zip(form.names, restored, strict=True))
    assert (got["guidance"], got["steps"], got["width"], got["hidiffusion_t1"]) == (3.5, 9, "", "0.25")
    assert got["hidiffusion_t2"] == ""


def test_a_record_of_an_earlier_version_gives_all_it_says(form: JobForm, visitor: Visitor, site: Site) -> None:
    offer, job = form.job(values_of(form, width=128, height=128, method="hidiffusion", hidiffusion_t1="0.5"), visitor)
    record = planned(site, offer, job).record
    del record["asked"]
    restored, remarks = back(form, record)
    assert remarks == []
    _, same = form.job(restored, visitor)
    assert planned(site, offer, same).job == dataclasses.replace(planned(site, offer, job).job, asked=same.to_record())


def test_what_the_form_has_no_control_for_is_said(form: JobForm, visitor: Visitor, site: Site) -> None:
    offer, job = form.job(values_of(form, width=128, height=128, route="ladder"), visitor)
    changed = dataclasses.replace(job, dtype="bfloat16", scheduler="DDIM", strengths=(0.3,), vae_tiling=True)
    record = planned(site, offer, changed).record
    record["loras"] = [{"id": "mine/lora", "scale": 1.0, "weight_name": None}]
    record["seed"] = 2**60
    record["image"] = None
    _, remarks = back(form, record)
    assert remarks[:2] == [
        "the seed 1152921504606846976 is larger than a browser can hold exactly",
        "it was made with LoRA mine/lora, which no control here loads",
    ]
    assert "it was made in bfloat16, here in float32" in remarks
    assert "it was made with the scheduler DDIMScheduler, here with the model's own" in remarks
    assert "the stages of the route changed the picture by 0.3, here by 0.1" in remarks
    assert "decoding in tiles was on, here off" in remarks


def test_the_picture_it_began_with_is_asked_for_and_never_opened(
    form: JobForm, visitor: Visitor, site: Site, upload: str
) -> None:
    offer, job = form.job(values_of(form, image=upload, strength=0.5), visitor)
    record = planned(site, offer, job).record
    record["image"] = record["asked"]["image"] = "/etc/passwd"
    restored, remarks = back(form, record)
    got = dict(zip(form.names, restored, strict=True))
    assert remarks == ["it began with a picture, which the file does not hold: choose it again"]
    assert (got["image"], got["strength"], got["width"], got["height"]) == (None, 0.5, 88, 40)
    _, same = form.job(values_of(form, **{**got, "image": upload}), visitor)
    assert planned(site, offer, same).job.strength == 0.5


def test_a_model_that_is_not_offered_is_said(form: JobForm, visitor: Visitor, site: Site) -> None:
    offer, job = form.job(values_of(form, method="linfusion", steps=3), visitor)
    record = planned(site, offer, job).record
    record["model"] = "/home/somebody/model"
    restored, remarks = back(form, record)
    got = dict(zip(form.names, restored, strict=True))
    assert remarks[0] == "it was made with /home/somebody/model, which is not offered here: emoji-sd is set"
    assert (got["model"], got["steps"], got["method"]) == ("emoji-sd", 3, "linfusion")


class TestAFileThatARecordNames:
    """Anybody may write a record."""

    @staticmethod
    def record(form: JobForm, visitor: Visitor, site: Site, model: str, method: str, weights: Any) -> dict[str, Any]:
        offer, job = form.job(values_of(form, model=model, method=method), visitor)
        record = planned(site, offer, job).record
        for methods in (record["methods"], record["asked"]["methods"]):
            methods[method]["weights"] = weights
        record["fingerprints"]["weights"] = {method: "0123456789abcdef"}
        return record

    @pytest.mark.parametrize(("model", "method"), [("emoji-sd", "linfusion"), ("emoji-flux", "clear")])
    @pytest.mark.parametrize("form_of_it", [str, lambda path: [str(path)]], ids=["text", "list"])
    def test_is_not_opened_and_nothing_tells_whether_it_is_there(
        self,
        form: JobForm,
        visitor: Visitor,
        site: Site,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        model: str,
        method: str,
        form_of_it: Callable[[Path], Any],
    ) -> None:
        path, said, opened = tmp_path / "secret.safetensors", [], []
        record = self.record(form, visitor, site, model, method, form_of_it(path))

        def watched(file: Any, *given: Any, **named: Any) -> Any:
            opened.append(str(file))
            return open(file, *given, **named)

        monkeypatch.setattr(fingerprints, "open", watched, raising=False)
        for there in (False, True):
            if there:
                path.write_bytes(b"secret")
            restored, remarks = back(form, record)
            said.append(remarks)
            assert dict(zip(form.names, restored, strict=True))[f"{method}_weights"] == ""
        assert said[0] == said[1]
        assert any(line.startswith(f"{method}, weights: ") and line.endswith("is not offered") for line in said[0])
        assert str(path) not in opened

    def test_is_restored_and_compared_where_it_is_offered(
        self, form: JobForm, visitor: Visitor, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "mine.safetensors"
        path.write_bytes(b"weights")
        monkeypatch.setattr(site.shelf, "weights", (str(path),))
        record = self.record(form, visitor, site, "emoji-sd", "linfusion", str(path))
        restored, remarks = back(form, record)
        assert dict(zip(form.names, restored, strict=True))["linfusion_weights"] == str(path)
        assert remarks == ["the weights of linfusion differ"]
        record["fingerprints"]["weights"] = {"linfusion": fingerprints.fingerprint(path)}
        assert back(form, record) == (restored, [])


@pytest.mark.parametrize("record", [{}, {"prompt": 5}, {"asked": []}])
def test_what_is_no_record_is_refused(form: JobForm, record: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="does not say how the picture was made"):
        form.restored(record)
