"""How the handlers of a page are seen by Gradio and by its clients."""

from __future__ import annotations

import functools
import html
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from .server.worker import SAID

__all__ = ["DEVICE", "SAID", "message", "named", "told"]

#: One at a time on the device, whichever page asks.
DEVICE = "device"
# Seconds for which a message is shown; what it says stays on the page.
SHOWN = 10


def named(handler: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    """`handler(request, *values)` with a name for each of its values, by which `gradio_client` gives them.

    Works for functions and for generators.
    """
    call: Callable[..., Any]
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def call(request: gr.Request, *values: Any) -> Any:
            yield from handler(request, *values)

    else:

        @functools.wraps(handler)
        def call(request: gr.Request, *values: Any) -> Any:
            return handler(request, *values)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("request", kind, annotation=gr.Request)]
    # Gradio takes the default of a control that begins empty from here.
    parameters += [inspect.Parameter(name, kind, default=None) for name in names]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def message(text: str) -> gr.Error:
    """To be raised: shown on the page, which lives on."""
    return gr.Error(_as_text(text), duration=SHOWN, print_exception=False)


def told(text: str, *, warn: bool = False) -> None:
    """Shows it on the page, each line as one."""
    (gr.Warning if warn else gr.Info)(_as_text(text).replace("\n", "<br>"), duration=SHOWN)


def _as_text(text: str) -> str:
    """What pops up is HTML, and a picture in it would be fetched from wherever somebody has written."""
    return html.escape(text, quote=False)
