"""What Gradio would answer that no page here needs: closed, as it fetches, stores or runs what a request names."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException

if TYPE_CHECKING:
    from .uploads import Room

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
UPLOAD, CANCEL, LOGIN = f"{API}/upload", f"{API}/cancel", "/login"
# Bytes of a request that is no upload: a form with everything filled in has some thousands.
MAX_FORM = 4 * 2**20
# Around the file of an upload.
ENVELOPE = 2**16
# So many wrong passwords in so many seconds, whoever gives them, and for the rest of these no more are looked at.
GUESSES, GUESSED_IN = 10, 60.0

# What Gradio answers to a wrong password.
WRONG = 400
#: Names of this machine for itself.
LOOPBACK = ("127.0.0.1", "localhost", "::1")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Gate:
    """ASGI middleware before everything else.

    Args:
        max_upload: bytes.
        room: for uploads; asked in a thread.
        only_here: whether nobody but pages of this machine is to be answered, as nothing else keeps others out: a page
            from the web that is open in a browser here could ask for this server, by its own origin, or by a name of
            its own that leads to 127.0.0.1.
        cancelled: is given the name of a visitor who does not want any more what is being made.
    """

    def __init__(
        self,
        app: Any,
        max_upload: int,
        room: Room,
        *,
        only_here: bool = False,
        cancelled: Callable[[str], Any] = lambda visitor: None,
    ) -> None:
        self._app, self._max_upload, self._only_here, self._cancelled = app, max_upload, only_here, cancelled
        self._room = room
        self._wrong: deque[float] = deque(maxlen=GUESSES)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        target = next((path.removeprefix(start) for start in FILES if path.startswith(start)), "")
        if path.startswith(CLOSED) or ":/" in target:
            await _answer(send, 404, b"Not here.")
            return
        headers = dict(scope["headers"])
        if self._only_here and not all(_is_here(headers[name]) for name in (b"host", b"origin") if name in headers):
            await _answer(send, 403, b"This server answers to 127.0.0.1 and localhost alone.")
            return
        if path.startswith(LOGIN) and self._has_guessed():
            await _answer(send, 429, b"Too many wrong passwords. Try again in a minute.")
            return
        uploads = path.startswith(UPLOAD) and scope["method"] == "POST"
        most = self._max_upload + ENVELOPE if uploads else MAX_FORM
        length = headers.get(b"content-length", b"0")
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
            if path.startswith(CANCEL):
                self._tell(message)
            return message

        async def noted(message: Message) -> None:
            if path.startswith(LOGIN) and message.get("status") == WRONG:
                self._wrong.append(time.monotonic())
            await send(message)

        if not uploads:
            await self._app(scope, counted, noted)
            return
        expected = int(length) or most  # what does not say how long it is counts as much as it may be
        if not await asyncio.to_thread(self._room.take, expected):
            await _answer(send, 507, b"This server has no room for more files now. Try again later.")
            return
        try:
            await self._app(scope, counted, noted)
        finally:
            self._room.release(expected)

    def _has_guessed(self) -> bool:
        return len(self._wrong) == GUESSES and time.monotonic() - self._wrong[0] < GUESSED_IN

    def _tell(self, message: Message) -> None:
        """Who cancels: Gradio itself makes no difference between that and a page that is gone."""
        try:
            self._cancelled(str(json.loads(message["body"])["session_hash"]))
        except (ValueError, KeyError, TypeError):  # Gradio says what is wrong with it
            return


def _is_here(given: bytes) -> bool:
    """Whether a host, or the origin of a page, is this machine by one of its own names for itself."""
    text = given.decode("latin-1")
    try:
        return urlsplit(text if "//" in text else f"//{text}").hostname in LOOPBACK
    except ValueError:
        return False


async def _answer(send: Send, status: int, text: bytes) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
