"""Files and entries put back into the form that makes the same again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ...pipelines.errors import BadInput
from ..forms.reading import plain
from ..server import uploads
from ..server.live import without_folders

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..forms.job_form import JobForm


@dataclass(frozen=True)
class Restored:
    """
    Attributes:
        clip: whether the form of clips is filled in, else that of pictures.
        updates: of the inputs of the one form and then of the other, which stays as it is.
        remarks: what is not as in the file, a line each.
    """

    clip: bool
    updates: Sequence[Any]
    remarks: Sequence[str]

    @property
    def page(self) -> str:
        return "Video" if self.clip else "Image"

    def lines(self, name: str) -> list[str]:
        """Where `name` went, and what it could not bring along."""
        lines = [f"All settings of {name} are on the {self.page} page."]
        if self.remarks:
            lines = [f"The settings of {name} are on the {self.page} page, but not all of them:"]
        return [without_folders(line) for line in (*lines, *self.remarks)]

    def said(self, name: str) -> str:
        """The same as Markdown."""
        first, *others = map(plain, self.lines(name))
        return "\n".join([first, *(["", *(f"- {line}" for line in others)] if others else [])])


def record_of(path: str) -> dict[str, Any]:
    """What a file remembers that a visitor has brought, in which only the name tells of `path`.

    Raises:
        BadInput: it remembers nothing by which one picture or clip is made again.
    """
    try:
        return uploads.made_here(path)
    except BadInput as error:
        raise BadInput(f"Nothing to restore: {error}") from error


def restored(record: dict[str, Any], image_form: JobForm, video_form: JobForm) -> Restored:
    """
    Raises:
        BadInput: the record does not say how it was made, or with more text than this server takes.
    """
    image_form.site.limits.check_texts(str(record.get("prompt", "")), record.get("negative"))
    clip = record.get("frames") is not None
    updates, remarks = (video_form if clip else image_form).restored(record)
    other = [gr.skip()] * len((image_form if clip else video_form).inputs)
    return Restored(clip, [*other, *updates] if clip else [*updates, *other], remarks)


def name_of(path: str) -> str:
    """Of an uploaded file, as it is to be said."""
    return Path(path).name
