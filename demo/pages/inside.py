"""The page that shows what happened inside the model: densities, masks, phases, and what stayed dense."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from ...accel import report_pictures
from .. import endpoint
from . import inside_pictures, inside_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...accel.report import Report
    from ...accel.report_pictures import Masked
    from ..server.visitors import Entry
    from ..site import Site

NOTHING = "Nothing here yet: make a picture or a clip, and see what happened inside the model while it was made."


class InsidePage:
    """What a visitor has made, one at a time, with the report of its run."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.entry = gr.Dropdown(
            [],
            label="Look into",
            info="What you have made, the newest first.",
            elem_id="inside-entry",
            filterable=False,
        )
        self.newest = gr.State(0)
        self.summary = gr.Markdown(NOTHING, elem_id="inside-summary")
        # What they show is written in them.
        shared: dict[str, Any] = {
            "format": "png",
            "interactive": False,
            "show_label": False,
            "buttons": ["download", "fullscreen"],
        }
        with gr.Row(elem_classes="page"):
            with gr.Column(min_width=320):
                self.picture = gr.Image(
                    label="Density",
                    alt_text="A map of the layers: how much of dense attention each has computed",
                    visible=False,
                    elem_id="inside-picture",
                    **shared,
                )
            with gr.Column(min_width=320):
                with gr.Column(visible=False, elem_id="inside-phases") as self.phases_group:
                    self.phases_said = gr.Markdown(container=True)
                    self.phases = gr.Image(
                        label="When HiDiffusion was at work",
                        alt_text="Bars of the steps in which each part of HiDiffusion was at work",
                        **shared,
                    )
                with gr.Column(visible=False) as self.mask_group:
                    with gr.Row():
                        self.layer = gr.Dropdown(
                            label="Block mask of layer",
                            elem_id="inside-layer",
                            filterable=False,
                            min_width=200,
                            scale=2,
                        )
                        self.head = gr.Dropdown(
                            label="Head", elem_id="inside-head", filterable=False, min_width=80, scale=1
                        )
                    self.part = gr.Dropdown(
                        label="Guidance branch",
                        info="The model is called once with the prompt and once without; each has its own masks.",
                        elem_id="inside-branch",
                        filterable=False,
                    )
                    self.mask = gr.Image(
                        label="Block mask",
                        alt_text="A grid of query blocks down and key blocks across; light ones are computed",
                        elem_id="inside-mask",
                        **shared,
                    )
                    self.mask_said = gr.Markdown(container=True, elem_id="inside-mask-said")
        self.layers = gr.Dataframe(
            headers=list(inside_text.HEADERS),
            datatype="str",
            label="Attention layers, dense ones first",
            interactive=False,
            wrap=True,
            column_widths=[65, 350, 105, 115, 80, 105, 390],
            max_height=420,
            show_search="search",
            buttons=["fullscreen"],
            visible=False,
            elem_id="inside-layers",
        )
        self.shown = [
            self.summary,
            self.picture,
            self.phases_group,
            self.phases_said,
            self.phases,
            self.mask_group,
            self.layer,
            self.head,
            self.part,
            self.mask,
            self.mask_said,
            self.layers,
        ]

    def wire(self) -> None:
        """Its events. The tab it is on shows the newest whenever there is one that it has not shown yet."""
        # Gradio would refuse what the page it sent last does not list; everything is checked here.
        shared: dict[str, Any] = {"preprocess": False, "queue": False}
        tab = tab_of(self.summary)
        if tab is not None:
            tab.select(
                self.refresh,
                [self.entry, self.newest],
                [self.entry, self.newest, *self.shown],
                queue=False,
                preprocess=False,
                show_progress="hidden",
                api_name="inside_refresh",
                api_visibility="undocumented",
            )
        self.entry.input(
            self.look,
            [self.entry],
            [*self.shown, self.entry],
            api_name="inside",
            api_description="What a run of yours did: a summary, then pictures and the table of layers. By its number.",
            **shared,
        )
        gr.on(
            [self.layer.input, self.head.input, self.part.input],
            self.draw_mask,
            [self.entry, self.layer, self.head, self.part],
            [self.mask, self.mask_said],
            api_name="mask",
            api_description="A block mask of a run with AdaSpa: entry, layer and head by number, and the "
            'guidance branch, such as "0", or "0, item 1" of several at a time.',
            show_progress="hidden",
            **shared,
        )

    def refresh(self, request: gr.Request, entry: Any = None, newest: Any = 0) -> list[Any]:
        """The entries there are; the newest is shown where it is new, else what is shown stays."""
        entries = self.site.visitors.of(request).entries
        if not entries:
            return [gr.update(choices=[], value=None), 0, *self._nothing()]
        numbers = [each.number for each in entries]
        if numbers[-1] == newest and entry in numbers:
            return [gr.skip()] * (2 + len(self.shown))
        *shown, listed = self.look(request, numbers[-1])
        return [listed, numbers[-1], *shown]

    def look(self, request: gr.Request, entry: Any = None) -> list[Any]:
        """What there is to see of an entry, by its number; of the newest without."""
        entries = self.site.visitors.of(request).entries
        if not entries:
            return [*self._nothing(), gr.update(choices=[], value=None)]
        chosen = _entry(entries, entries[-1].number if entry is None else entry)
        choices = [(f"{each.number}: {each.caption}", each.number) for each in reversed(entries)]
        return [*self._shown(chosen), gr.update(choices=choices, value=chosen.number)]

    def draw_mask(
        self, request: gr.Request, entry: Any, layer: Any = None, head: Any = None, part: Any = None
    ) -> tuple[Image.Image, str]:
        """One block mask and what it shows; the first there is of what is not named."""
        chosen = _entry(self.site.visitors.of(request).entries, entry)
        report = chosen.result.report
        masks = report_pictures.masks(report) if report else ()
        if not masks or report is None:
            gone = report is not None and inside_text.masks_are_gone(report)
            why = inside_text.MASKS_GONE if gone else "No method has searched for any."
            raise endpoint.message(f"entry {chosen.number} has no block masks. {why}")
        masked = next((each for each in masks if layer is None or layer == each.number), None)
        if masked is None:
            there = report_pictures.spans(each.number for each in masks)
            raise endpoint.message(f"no mask of layer {str(layer)[:20]!r}: there is {there}.")
        place = next(
            (
                each
                for each in masked.kept
                if (part is None or part == _part(*each[:2])) and (head is None or head == each[2])
            ),
            None,
        )
        if place is None:
            heads = report_pictures.spans({head for _, _, head in masked.kept})
            parts = dict.fromkeys(_part(branch, item) for branch, item, _ in masked.kept)
            there = f"heads {heads} in branch {' and '.join(parts)}"
            raise endpoint.message(f"no mask of that head and branch: layer {masked.number} has {there}.")
        return _mask(report, masked, *place)

    def _nothing(self) -> list[Any]:
        return [NOTHING, *(gr.skip() if part in self._within else gr.update(visible=False) for part in self.shown[1:])]

    @property
    def _within(self) -> list[Any]:
        """What is hidden with the group it is in."""
        return [self.phases_said, self.phases, self.layer, self.head, self.part, self.mask, self.mask_said]

    def _shown(self, entry: Entry) -> list[Any]:
        result = entry.result
        said = inside_text.summary(result, self.site.shelf.of_record(result.record["model"]))
        report = result.report
        if report is None:
            return [said, *self._nothing()[1:]]
        picture, remark = _density(report)
        return [
            f"{said}{remark}",
            gr.update(value=picture, visible=picture is not None),
            *self._phases(report),
            *self._mask(report),
            gr.update(value=inside_text.table(report), visible=True),
        ]

    def _phases(self, report: Report) -> list[Any]:
        phases = inside_pictures.phases_of(report)
        picture = inside_pictures.strip(phases)
        return [
            gr.update(visible=bool(phases)),
            inside_text.of_phases(phases),
            gr.update(value=picture, visible=picture is not None),
        ]

    def _mask(self, report: Report) -> list[Any]:
        masks = report_pictures.masks(report)
        if not masks:
            return [gr.update(visible=False), *[gr.skip()] * 5]
        first = masks[0]
        parts = list(dict.fromkeys(_part(branch, item) for branch, item, _ in first.kept))
        heads = sorted({head for _, _, head in first.kept})
        return [
            gr.update(visible=True),
            gr.update(choices=[(f"{each.number}: {each.name}", each.number) for each in masks], value=first.number),
            gr.update(choices=[(str(number), number) for number in heads], value=heads[0]),
            gr.update(choices=parts, value=parts[0], visible=len(parts) > 1),
            *_mask(report, first, *next(iter(first.kept))),
        ]


def _entry(entries: Sequence[Entry], number: Any) -> Entry:
    found = next((entry for entry in entries if entry.number == number), None)
    if found is None:
        there = (
            f"there is {report_pictures.spans(entry.number for entry in entries)}" if entries else "there is none yet"
        )
        raise endpoint.message(f"no entry {str(number)[:20]!r} of yours: {there}.")
    return found


def _density(report: Report) -> tuple[Image.Image | None, str]:
    """The picture of densities, or why there is none, for below the summary."""
    if not inside_text.has_heads(report):
        return inside_pictures.by_layer(report), ""
    try:
        return report_pictures.draw(report, beside=False), ""
    except ValueError as error:
        return None, f"\n- {str(error)[:1].upper()}{str(error)[1:]}."


def _mask(report: Report, layer: Masked, branch: int, item: int, head: int) -> tuple[Image.Image, str]:
    """One block mask, and what it shows."""
    picture = report.mask_image(layer.number, head, branch=branch, item=item)
    return inside_pictures.with_axes(picture), inside_text.of_mask(layer, branch, item, head)


def _part(branch: int, item: int) -> str:
    """What a guidance branch is called; of a batch each item has masks of its own."""
    return str(branch) if not item else f"{branch}, item {item}"


def tab_of(component: gr.blocks.Block) -> gr.Tab | None:
    """The tab on which a component is."""
    parent = component.parent
    while parent is not None and not isinstance(parent, gr.Tab):
        parent = parent.parent
    return parent
