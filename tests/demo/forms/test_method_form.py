"""The controls of methods are made of their configurations; no file is opened because a request names it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import gradio as gr
import pytest
from attnswap.accel import methods
from attnswap.accel.methods.base import Config
from attnswap.demo.forms.method_form import MethodForm
from attnswap.demo.server.shelf import Offer
from attnswap.demo.site import Site
from attnswap.pipelines import settings
from attnswap.pipelines.errors import BadInput


@dataclass(frozen=True)
class Novel(Config):
    """A method that came yesterday.

    Attributes:
        depth: how deep it goes.
        quick: whether it hurries; None decides.
        mode: one of two.
        when: only Python can say.
        table: a file.
    """

    name: ClassVar[str] = "novel"
    files: ClassVar[frozenset[str]] = frozenset({"table"})

    depth: int = 3
    quick: bool = True
    mode: Literal["up", "down"] = "up"
    when: Callable[[int], bool] = bool
    table: str | None = None


def form_of(site: Site, model: str = "emoji-sd", **options: Any) -> MethodForm:
    with gr.Blocks(analytics_enabled=False):
        return MethodForm(site, site.shelf.offer(model), elem="image", **options)


def values_of(form: MethodForm, **given: Any) -> list[Any]:
    """As a page sends them that shows what the form begins with, but for those given."""
    assert set(given) <= set(form.names)
    return [given.get(name, control.value) for name, control in zip(form.names, form.inputs, strict=True)]  # type: ignore[attr-defined]


def chosen(form: MethodForm, offer: Offer, **given: Any) -> Any:
    return form.methods(values_of(form, **given), offer)


def control(form: MethodForm, name: str) -> Any:
    return form.inputs[form.names.index(name)]


@pytest.fixture
def sd(site: Site) -> Offer:
    return site.shelf.offer("emoji-sd")


@pytest.fixture
def flux(site: Site) -> Offer:
    return site.shelf.offer("emoji-flux")


def test_a_new_method_appears_by_itself(site: Site, sd: Offer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sd.__dict__, "methods", (*sd.methods, "novel"))
    monkeypatch.setitem(methods.CONFIGS, "novel", Novel)
    form = form_of(site)
    assert [name for name in form.names if name.startswith("novel")] == [
        "novel_depth",
        "novel_quick",
        "novel_mode",
        "novel_table",
    ]
    depth, quick, mode, table = (control(form, f"novel_{name}") for name in ("depth", "quick", "mode", "table"))
    assert (depth.placeholder, depth.info) == ("default: 3", "How deep it goes.")
    assert quick.choices == [("default: yes", ""), ("yes", "yes"), ("no", "no")]
    assert quick.info == "Whether it hurries; none decides."
    assert mode.choices == [("default: up", ""), ("up", "up"), ("down", "down")]
    assert table.choices == [("default: none", ""), ("none", "none")]
    got = chosen(form, sd, method="novel", novel_depth="5", novel_quick="no", novel_mode="down")
    assert got == {"novel": {"depth": 5, "quick": False, "mode": "down"}}
    with pytest.raises(BadInput, match="novel, table: '/etc/passwd' is not offered"):
        chosen(form, sd, method="novel", novel_table="/etc/passwd")


def test_every_setting_of_every_method_has_a_control_with_a_label_and_help(site: Site) -> None:
    form = form_of(site)
    known = [setting for method in settings.known_methods() for setting in settings.settings_of(method)]
    assert form.names == ["method", *(f"{setting.method}_{setting.name}" for setting in known)]
    for one in form.inputs[1:]:
        assert one.label  # type: ignore[attr-defined]
        assert one.info  # type: ignore[attr-defined]


def test_dense_is_first_and_has_no_settings(site: Site, sd: Offer) -> None:
    form = form_of(site)
    assert control(form, "method").value == "dense"
    assert chosen(form, sd) == {}
    assert chosen(form, sd, method=None) == {}
    assert chosen(form, sd, method="auto", hidiffusion_t1="0.5") == {"auto": {}}


def test_only_what_is_given_is_set(site: Site, sd: Offer) -> None:
    form = form_of(site)
    assert chosen(form, sd, method="hidiffusion") == {"hidiffusion": {}}
    got = chosen(form, sd, method="hidiffusion", hidiffusion_t1=" 0.5 ", hidiffusion_windows="4,2", linfusion_eps="1")
    assert got == {"hidiffusion": {"t1": 0.5, "windows": (4, 2)}}


def test_a_pair_has_the_settings_of_both(site: Site, sd: Offer) -> None:
    form = form_of(site)
    got = chosen(form, sd, method="hidiffusion+linfusion", hidiffusion_seed="7", linfusion_eps="1e-3")
    assert got == {"hidiffusion": {"seed": 7}, "linfusion": {"eps": 1e-3}}
    shown = form._shown_groups("hidiffusion+linfusion")
    visible = [name for name, update in zip(settings.known_methods(), shown, strict=True) if update["visible"]]
    assert visible == ["hidiffusion", "linfusion"]


def test_a_client_may_send_numbers_and_switches_as_they_are(site: Site, sd: Offer) -> None:
    got = chosen(form_of(site), sd, method="hidiffusion", hidiffusion_t1=0.5, hidiffusion_raunet=False)
    assert got == {"hidiffusion": {"t1": 0.5, "raunet": False}}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"hidiffusion_t1": "much"}, "hidiffusion, t1: 'much': expected none or a number."),
        ({"hidiffusion_windows": "2"}, "hidiffusion, windows: '2': expected values separated by commas"),
        ({"hidiffusion_by": "time"}, "hidiffusion, by: 'time' is not offered."),
        ({"hidiffusion_raunet": "perhaps"}, "hidiffusion, raunet: 'perhaps' is not offered."),
        ({"hidiffusion_t1": ["0.5"]}, "hidiffusion, t1: expected text, got a list."),
        ({"hidiffusion_seed": 10**5000}, "hidiffusion, seed: the number is too large."),
        ({"method": "clear"}, "Method: 'clear' is not offered."),
        ({"method": 7}, "Method: expected text, got a number."),
        ({"method": {"a": 1}}, "Method: expected text, got an object."),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_setting(
    site: Site, sd: Offer, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(BadInput) as refusal:
        chosen(form_of(site), sd, **{"method": "hidiffusion", **given})
    assert str(refusal.value).startswith(said)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["/etc/passwd", "some/hub-id", "../emoji-sd", "Huage001/CLEAR", "emoji-flux"])
def test_weights_are_never_what_a_request_names(site: Site, sd: Offer, name: str) -> None:
    with pytest.raises(BadInput, match=r"linfusion, weights: '.*' is not offered") as refusal:
        chosen(form_of(site), sd, method="linfusion", linfusion_weights=name)
    assert "\n" not in str(refusal.value)


def test_weights_are_those_that_come_with_the_model_and_those_of_the_operator(site: Site, sd: Offer) -> None:
    form = form_of(site)
    assert [value for _, value in control(form, "linfusion_weights").choices] == ["", "auto", "none", "emoji-sd"]
    for text, value in (("auto", "auto"), ("none", None), ("emoji-sd", "emoji-sd")):
        assert chosen(form, sd, method="linfusion", linfusion_weights=text) == {"linfusion": {"weights": value}}


def test_weights_of_the_operator_are_offered(site: Site, sd: Offer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site.shelf, "weights", ("mine/weights",))
    got = chosen(form_of(site), sd, method="linfusion", linfusion_weights="mine/weights")
    assert got == {"linfusion": {"weights": "mine/weights"}}


def test_what_is_left_empty_shows_what_it_stands_for(site: Site, flux: Offer) -> None:
    form = form_of(site, "emoji-flux")
    assert control(form, "clear_radius").placeholder == "preset: 3"
    assert control(form, "clear_weights").choices[0] == ("preset: emoji-flux", "")
    assert control(form, "clear_ntk_factor").placeholder == "default: 1.0"
    assert control(form, "clear_ntk_decay").choices[0] == ("default: no", "")


def test_it_depends_on_the_size(site: Site, sd: Offer) -> None:
    form = form_of(site)
    t2 = form.names.index("hidiffusion_t2")
    assert form.for_size(sd, 64, 64)[t2]["placeholder"] == "default: none"
    assert form.for_size(sd, 256, 256)[t2]["placeholder"] == "preset: 1.0"
    assert "value" not in form.for_size(sd, 256, 256)[t2]


def test_another_model_has_its_own_choices_and_keeps_what_it_can(site: Site, flux: Offer) -> None:
    form = form_of(site)
    values = values_of(form, method="auto", linfusion_weights="emoji-sd", adaspa_sparsity="0.5")
    by_name = dict(zip(form.names, form.for_offer(flux, values=values), strict=True))
    assert by_name["method"]["value"] == "auto"
    assert [value for _, value in by_name["method"]["choices"]] == list(flux.methods)
    assert by_name["adaspa_sparsity"]["value"] == "0.5"
    assert by_name["linfusion_weights"]["value"] == ""
    values = values_of(form, method="hidiffusion")
    assert form.for_offer(flux, values=values)[0]["value"] == "dense"


def test_methods_are_restored_as_they_were_given(site: Site, sd: Offer) -> None:
    form = form_of(site)
    given = {"hidiffusion": {"t1": 0.5, "raunet": False, "windows": [4, 2]}, "linfusion": {"weights": None}}
    values = [update["value"] for update in form.restored(given)]
    assert form.methods(values, sd) == {
        "hidiffusion": {"t1": 0.5, "raunet": False, "windows": (4, 2)},
        "linfusion": {"weights": None},
    }
    for methods_ in ({}, {"auto": {}}):
        assert form.methods([update["value"] for update in form.restored(methods_)], sd) == methods_
    assert form.lost(given, sd) == []


def test_what_cannot_be_restored_is_said(site: Site, sd: Offer) -> None:
    form = form_of(site)
    given = {"linfusion": {"weights": "/home/me/weights", "gone": 1}}
    values = [update["value"] for update in form.restored(given)]
    assert form.methods(values, sd) == {"linfusion": {}}
    assert form.lost(given, sd) == [
        "linfusion, gone: no such setting here",
        "linfusion, weights: /home/me/weights is not offered",
    ]
    assert form.restored({"clear": {}})[0]["value"] == "dense"
    assert form.lost({"clear": {}}, sd) == ["method clear is not offered for emoji-sd"]


def test_a_second_method_may_be_none_and_has_names_of_its_own(site: Site, sd: Offer) -> None:
    form = form_of(site, prefix="second_", optional=True)
    assert form.names[:2] == ["second_method", "second_adaspa_sparsity"]
    assert control(form, "second_method").value == "none"
    assert chosen(form, sd) is None
    assert chosen(form, sd, second_method="dense") == {}
    with pytest.raises(BadInput, match="Second method: 'x' is not offered"):
        chosen(form, sd, second_method="x")


def test_why_a_model_cannot_have_a_method_is_on_the_page(site: Site) -> None:
    said = form_of(site).why_not.value
    assert "Not for this model: adaspa, clear" in said
    assert "<li>adaspa: " in said
