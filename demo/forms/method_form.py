"""Which method, and its settings: made of the configurations, so that a new method or setting appears by itself."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.components import Component

from ...pipelines import load, settings
from ...pipelines.errors import BadInput, near
from ...pipelines.settings import AUTO, Setting
from . import reading

if TYPE_CHECKING:
    from ..server.shelf import Offer
    from ..site import Site

DENSE, NONE = "dense", "none"
# The one choice that is every setting's first: leave it to the model's preset, else to the method.
USUAL = ""
TOGETHER = "+"
# Characters of a value; much longer ones would take minutes to read.
LONGEST = 200
LABELS = {
    NONE: "none",
    DENSE: "dense: nothing is replaced",
    AUTO: "auto: what suits this model and size best",
}
ABOUT = (
    "Attention relates every part of a picture or clip to every other, which takes most of the time at large sizes. "
    "Dense attention computes all of it, a method only a part."
)


class MethodForm:
    """A choice of method and a group of settings for each, of which those of the chosen one are visible.

    To be built inside `gr.Blocks`. Events that take `inputs` are to be made with `preprocess=False`: Gradio would
    refuse a choice that only another model has, and everything is checked here.

    Args:
        prefix: of the names.
        optional: there may be none.
        elem: prefix of the elements' ids.

    Attributes:
        inputs: The choice, then the settings of all methods.
        names: Of these at endpoints.
    """

    def __init__(self, site: Site, offer: Offer, *, prefix: str = "", optional: bool = False, elem: str) -> None:
        self._site, self._first, self._optional = site, offer, optional
        self._label = "Second method" if optional else "Method"
        self.choice = gr.Dropdown(
            **self._choice_props(offer),
            value=self.choices(offer)[0],
            label=self._label,
            info=None if optional else ABOUT,
            elem_id=f"{elem}-method",
            filterable=False,
            interactive=True,
        )
        self.why_not = gr.Markdown(refused(offer), elem_id=f"{elem}-method-refused")
        self.settings: list[Setting] = []
        self.inputs: list[Component] = [self.choice]
        self._groups: dict[str, gr.Column] = {}
        for method in settings.known_methods():
            with gr.Column(visible=False, elem_id=f"{elem}-{method}", min_width=0) as self._groups[method]:
                gr.Markdown(f"**{method}**: {settings.summary_of(method)}")
                title = f"Settings of {method}"
                with gr.Accordion(title, open=False, elem_id=f"{elem}-{method}-settings"), gr.Row():
                    for setting in settings.settings_of(method):
                        self.settings.append(setting)
                        self.inputs.append(self._control(setting, offer, f"{elem}-{method}-{setting.name}"))
        self.names = [f"{prefix}method", *(f"{prefix}{one.method}_{one.name}" for one in self.settings)]
        self.choice.change(
            self._shown_groups,
            self.choice,
            list(self._groups.values()),
            preprocess=False,
            queue=False,
            show_progress="hidden",
            api_name=f"{elem}_method",
            api_visibility="undocumented",
        )

    def choices(self, offer: Offer) -> tuple[str, ...]:
        return ((NONE,) if self._optional else ()) + tuple(offer.methods)

    def methods(self, values: Sequence[Any], offer: Offer) -> dict[str, dict[str, Any]] | None:
        """What `Job.methods` takes: settings that were given. None for no second method.

        Raises:
            BadInput: a method or a value that is not offered, or that is none, with what the setting takes.
        """
        chosen = reading.one_of(values[0], self._label, self.choices(offer))
        if chosen == NONE:
            return None
        found: dict[str, dict[str, Any]] = {method: {} for method in names_in(chosen)}
        for setting, value in zip(self.settings, values[1:], strict=True):
            if setting.method in found and (text := _text(value, setting)) != USUAL:
                found[setting.method][setting.name] = self._read(setting, text, offer)
        return found

    def for_offer(
        self, offer: Offer, width: int | None = None, height: int | None = None, values: Sequence[Any] | None = None
    ) -> list[dict[str, Any]]:
        """Updates of `inputs` for another model: choices and what they stand for if left alone.

        Args:
            values: as they are now; what `offer` has, too, stays. Without, all are emptied.
        """
        kept = list(values) if values is not None else [None] * len(self.inputs)
        choices = self.choices(offer)
        method = kept[0] if kept[0] in choices else choices[0]
        updates = [gr.update(value=method, **self._choice_props(offer))]
        for setting, value in zip(self.settings, kept[1:], strict=True):
            if setting.names_file and value not in self._allowed(setting, offer):
                value = USUAL
            updates.append(gr.update(value=value or USUAL, **self._props(setting, offer, width, height)))
        return updates

    def for_size(self, offer: Offer, width: int | None, height: int | None) -> list[dict[str, Any]]:
        """Updates of `inputs` for another size: what settings stand for if left alone."""
        return [gr.skip(), *(gr.update(**self._props(setting, offer, width, height)) for setting in self.settings)]

    def restored(self, methods: Mapping[str, Mapping[str, Any]], offer: Offer | None = None) -> list[dict[str, Any]]:
        """Updates of `inputs` that give these methods; what `offer` does not have stays as usual, see `lost`."""
        values, _ = self._recalled(methods, offer or self._first)
        return [gr.update(value=value) for value in values]

    def readable(self, methods: Mapping[str, Mapping[str, Any]], offer: Offer) -> dict[str, dict[str, Any]]:
        """`methods` with no files but those that the operator allows."""
        found = {method: dict(values) for method, values in methods.items()}
        for setting in self.settings:
            values = found.get(setting.method, {})
            if setting.names_file and setting.name in values:
                text = settings.shown(values.pop(setting.name))
                if text in self._allowed(setting, offer):
                    values[setting.name] = settings.read_value(setting.method, setting.name, text)
        return found

    def lost(self, methods: Mapping[str, Mapping[str, Any]], offer: Offer) -> list[str]:
        """What `restored` cannot give, a line each."""
        return self._recalled(methods, offer)[1]

    def _recalled(self, methods: Mapping[str, Mapping[str, Any]], offer: Offer) -> tuple[list[str], list[str]]:
        choices, lost = self.choices(offer), []
        chosen = next((one for one in choices if set(names_in(one)) == set(methods) and one != NONE), None)
        if chosen is None:
            lost.append(f"method {reading.cut(TOGETHER.join(methods))} is not offered for {offer.label}")
            chosen, methods = choices[0], {}
        values = [chosen]
        known = {(setting.method, setting.name) for setting in self.settings}
        lost += [
            f"{m}, {reading.cut(name)}: no such setting here"
            for m in methods
            for name in methods[m]
            if (m, name) not in known
        ]
        for setting in self.settings:
            given = methods.get(setting.method, {})
            text = settings.shown(given[setting.name]) if setting.name in given else USUAL
            if text != USUAL and setting.kind != "text" and text not in self._allowed(setting, offer):
                lost.append(f"{setting.method}, {setting.name}: {reading.cut(text)} is not offered")
                text = USUAL
            values.append(text)
        return values, lost

    def _control(self, setting: Setting, offer: Offer, elem_id: str) -> Component:
        common = {
            "label": setting.name.replace("_", " "),
            "info": _info(setting),
            "elem_id": elem_id,
            "interactive": True,
            "min_width": 220,
            "value": USUAL,
            **self._props(setting, offer),
        }
        return gr.Textbox(**common) if setting.kind == "text" else gr.Dropdown(**common, filterable=False)

    def _props(
        self, setting: Setting, offer: Offer, width: int | None = None, height: int | None = None
    ) -> dict[str, Any]:
        """What a control shows of the value that it stands for if left alone."""
        preset = offer.preset.settings_of(setting.method, width, height)
        by_preset = setting.name in preset
        usual = f"preset: {settings.shown(preset[setting.name])}" if by_preset else f"default: {setting.shown}"
        if setting.kind == "text":
            return {"placeholder": usual}
        return {"choices": [(usual, USUAL), *((one, one) for one in self._allowed(setting, offer))]}

    def _allowed(self, setting: Setting, offer: Offer) -> tuple[str, ...]:
        """The values of a switch or a choice; of files those that the operator allows."""
        if not setting.names_file:
            return setting.choices
        preset = [offer.preset.methods, *offer.preset.methods_from.values()]
        named = [given.get(setting.method, {}).get(setting.name) for given in preset]
        files = [name for name in named if name is not None]
        files += [*bundled_files(setting.method, offer), *self._site.shelf.weights]
        return tuple(dict.fromkeys((*setting.choices, *files)))

    def _read(self, setting: Setting, text: str, offer: Offer) -> Any:
        """
        Raises:
            BadInput: no value of the setting, or a file that is not offered.
        """
        if setting.kind != "text" and text not in (allowed := self._allowed(setting, offer)):
            hint = near(text[: reading.SHOWN], allowed)
            raise BadInput(f"{setting.method}, {setting.name}: {reading.shown(text)} is not offered.{hint}")
        if len(text) > LONGEST:
            what = f"{setting.method}, {setting.name}: {reading.shown(text)}"
            raise BadInput(f"{what} has {len(text)} characters; a setting has {LONGEST} at most.")
        return settings.read_value(setting.method, setting.name, text)

    def _choice_props(self, offer: Offer) -> dict[str, Any]:
        return {"choices": [(LABELS.get(one, one.replace(TOGETHER, " + ")), one) for one in self.choices(offer)]}

    def _shown_groups(self, chosen: Any) -> list[dict[str, Any]]:
        named = names_in(chosen) if isinstance(chosen, str) else ()
        return [gr.update(visible=method in named) for method in self._groups]


def names_in(choice: str) -> tuple[str, ...]:
    """The methods of a choice: two for "hidiffusion+linfusion", none for "dense"."""
    return () if choice in (DENSE, NONE) else tuple(choice.split(TOGETHER))


def refused(offer: Offer) -> str:
    """Which methods a model cannot have, and why, as Markdown; "" where it can have all."""
    if not offer.refusals:
        return ""
    lines = "".join(f"<li>{html.escape(name)}: {html.escape(why)}</li>" for name, why in offer.refusals.items())
    return f"<details><summary>Not for this model: {', '.join(offer.refusals)}</summary><ul>{lines}</ul></details>"


def _info(setting: Setting) -> str:
    """Its help as a sentence, with None as it is written here."""
    text = re.sub(r"\bNone\b", "none", setting.help)
    return text[:1].upper() + text[1:]


def bundled_files(method: str, offer: Offer) -> tuple[str, ...]:
    """The name by which a bundled model has weights for a method beside its own."""
    folder = offer.model.folder
    mine = load.bundled().get(folder.name) == folder and (folder / method).is_dir()
    return (folder.name,) if mine else ()


def _text(value: Any, setting: Setting) -> str:
    """As it would be written; clients may send numbers and switches as what they are."""
    label = f"{setting.method}, {setting.name}"
    if isinstance(value, bool | int | float):
        return settings.shown(reading.bounded(value, label))
    return reading.text(value, label).strip()
