"""What Gradio would answer that no page here needs: closed, as it fetches, stores or runs what a request names."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

API = "/gradio_api"
#: Figures of what others do, copies of a page's state on disk, a recorder that runs FFmpeg on what it is sent, other
#: servers by way of this one, an editor of the server's code.
CLOSED = (
    "/monitoring",
    f"{API}/deep_link",
    f"{API}/process_recording",
    f"{API}/proxy=",
    f"{API}/run-history",
    f"{API}/runs",
    f"{API}/stream",
    f"{API}/undo-vibe-edit",
    f"{API}/vibe-edit",
)
#: Where a path of this machine or an address in the web may follow, of which Gradio would fetch the second.
FILES = (f"{API}/file=", f"{API}/file/")
UPLOAD = f"{API}/upload"
# Bytes of a request that is no upload: a form with everything filled in has some thousands.
MAX_FORM = 4 * 2**20
# Around the file of an upload.
ENVELOPE = 2**16

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """ASGI middleware before everything else.

    Args:
        max_upload: bytes.
    """

    def __init__(self, app: Any, max_upload: int) -> None:
        self._app, self._max_upload = app, max_upload

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        target = next((path.removeprefix(start) for start in FILES if path.startswith(start)), "")
        if path.startswith(CLOSED) or ":/" in target:
            await _answer(send, 404, b"Not here.")
            return
        most = self._max_upload + ENVELOPE if path.startswith(UPLOAD) else MAX_FORM
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > most:
            await _answer(send, 413, f"More than {most // 2**20} MiB.".encode())
            return
        count = 0

        async def counted() -> Message:
            """For what says that it is shorter than it is, or nothing."""
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > most:
                raise HTTPException(413, f"More than {most // 2**20} MiB.")
            return message

        await self._app(scope, counted, send)


async def _answer(send: Send, status: int, text: bytes) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
