"""The server of the demo: what it may reach and be reached by, and how it begins and ends.

Nothing heavy is imported before the environment is set: Gradio and the Hub's library read it when they are imported.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import importlib.util
import io
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..pipelines.errors import BadInput, JobFailed
from .server.folder import private_folder
from .server.gate import LOOPBACK

if TYPE_CHECKING:
    from ..pipelines.job import Job
    from .server.limits import Limits
    from .site import Site

# Requests of all visitors that may wait, estimates included; more are refused with a message.
QUEUE = 64
# At a time, of what is no job: those have a limit of their own.
AT_ONCE = 4
# Pages and clients, for each visitor that there may be.
SESSIONS = 4


def serve(
    models: Sequence[str],
    job: Job,
    limits: Limits,
    *,
    weights: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 7860,
    auth: str | None = None,
    share: bool = False,
    open_browser: bool = False,
    say: Callable[[str], None] = print,
    log: Callable[[str], None] = lambda line: None,
) -> None:
    """Offers the pages until Ctrl-C, or the signal that ends processes.

    Args:
        models: before those that come with attnswap.
        job: device, dtype and what else goes for all jobs.
        weights: of methods, to choose from.
        port: 0 takes one that is free.
        auth: "user:password"; None lets everybody in who reaches the address.
        share: have Gradio's servers pass on a public address.
        say: is given a line for the operator, the address above all.
        log: is given a line for every job, without the prompt.

    Raises:
        BadInput, UnsupportedModel: a model that cannot be had, an address that cannot be used, `auth` of another form.
        JobFailed: there is no public address to be had.
    """
    port, login = check(host, port, auth)
    with _Ending() as ending, private_folder() as folder, _environment(folder):
        from .cost.pace import Pace
        from .server.shelf import Shelf
        from .server.visitors import Visitors
        from .server.worker import Worker
        from .site import Site

        shelf, worker = Shelf(models, job, weights), Worker(log)
        (made := folder / "made").mkdir()
        site = Site(shelf, worker, Visitors(made, worker), limits, Pace(), folder)
        address = {"server_name": f"[{host}]" if ":" in host else host, "server_port": port, "share": share}
        with _offline(), _launched(site, **address, auth=login, inbrowser=open_browser) as (local, public):
            for line in _said(local, public, host, asks=auth is not None):
                say(line)
            try:
                ending.wait()
                say("Ending after this step; once more ends at once.")
            finally:
                worker.close()


@contextmanager
def running(site: Site, **launch: Any) -> Iterator[str]:
    """The address of a server on a free port of this machine, for the length of the block.

    Args:
        launch: arguments of Gradio's, in place of ours.
    """
    ours = {"server_name": LOOPBACK[0], "server_port": free_port(LOOPBACK[0], 0)}
    with _environment(site.folder), _launched(site, **{**ours, **launch}) as (local, _):
        yield local


def check(host: str, port: int, auth: str | None) -> tuple[int, Callable[[str, str], bool] | None]:
    """The port, as `free_port`, and who is let in, as `credentials`; tells before anything is imported what is wrong.

    Raises:
        BadInput: Gradio is not installed, or as these two.
    """
    if importlib.util.find_spec("gradio") is None:
        raise BadInput('the demo needs Gradio, which is not installed: pip install "attnswap[demo]"')
    login = None if auth is None else credentials(auth)
    return free_port(host, port), login


def credentials(text: str) -> Callable[[str, str], bool]:
    """Whether a user and a password are those in `text`, "user:password"; takes as long for any.

    Raises:
        BadInput: `text` is of another form.
    """
    user, colon, password = text.partition(":")
    if not (user.strip() and colon and password):
        raise BadInput("--auth takes a user and a password as USER:PASSWORD.")
    # Gradio takes the spaces around a user's name away.
    wanted = [_digest(user.strip()), _digest(password)]

    def known(user: str, password: str) -> bool:
        same = [hmac.compare_digest(_digest(given), one) for given, one in zip((user, password), wanted, strict=True)]
        return all(same)

    return known


def _digest(text: str) -> bytes:
    """Of the same length for all, as comparing tells lengths apart."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def free_port(host: str, port: int) -> int:
    """`port`, or for 0 one that is free.

    Raises:
        BadInput: nothing can listen there, and why.
    """
    if not 0 <= port < 2**16:
        raise BadInput(f"--port {port} is out of range: 0 to 65535.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listening:
            if sys.platform != "win32":  # there it would share the port
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            return int(listening.getsockname()[1])
    except (socket.gaierror, UnicodeError):
        raise BadInput(f"--host {host}: there is no such host.") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise BadInput(f"port {port} is in use; --port 0 takes one that is free.") from None
        raise BadInput(f"nothing can listen at {host}, port {port}: {error.strerror}.") from None


def _said(local: str, public: str | None, host: str, *, asks: bool) -> Iterator[str]:
    yield f"attnswap demo: {local} (Ctrl-C ends it)"
    if public:
        yield f"for everybody: {public}"
    if not asks and (public or host not in LOOPBACK):
        who = "Everybody with the address" if public else "Everybody in this network"
        yield f"{who} can use this machine; --auth USER:PASSWORD lets in only who knows both."


@contextmanager
def _launched(site: Site, **launch: Any) -> Iterator[tuple[str, str | None]]:
    """The address on this machine and the public one, if any, of a server.

    Raises:
        BadInput: something else has taken the port meanwhile.
        JobFailed: no public address was to be had.
    """
    from starlette.middleware import Middleware

    from . import app
    from .server import uploads, visitors
    from .server.gate import Gate

    host = str(launch["server_name"]).strip("[]")
    middleware = Middleware(
        Gate,
        max_upload=uploads.MAX_BYTES,
        only_here=host in LOOPBACK and not launch.get("share") and launch.get("auth") is None,
        cancelled=site.worker.ask,
        room=uploads.Room(site.folder / "cache"),
    )
    # Closed: what has a queue would go past it otherwise, and as many at once as there are threads.
    blocks = app.build(site).queue(max_size=QUEUE, default_concurrency_limit=AT_ONCE, api_open=False)
    ours = {
        "app_kwargs": {"middleware": [middleware]},
        "blocked_paths": _not_for_visitors(site.folder),
        "enable_monitoring": False,
        "footer_links": [],
        "inline": False,
        "max_file_size": uploads.MAX_BYTES,
        "mcp_server": False,
        "num_workers": 0,
        "prevent_thread_lock": True,
        "pwa": False,
        "quiet": True,
        "run_history": False,
        "share": False,
        "show_error": True,  # else clients would not see what is said to them
        "ssr_mode": False,
        # Gradio keeps a copy of the page's state for every name that a client gives itself.
        "state_session_capacity": SESSIONS * visitors.MAX_VISITORS,
    }
    said = io.StringIO()
    with _nothing_fetched():
        try:
            try:
                with redirect_stdout(said):  # of a public address it tells whatever it was asked
                    _, local, public = blocks.launch(**{**ours, **app.LOOK, **launch})
            except OSError as error:
                raise BadInput(f"port {launch['server_port']} is in use; --port 0 takes one that is free.") from error
            if launch.get("share") and public is None:
                why = " ".join(said.getvalue().split())
                raise JobFailed(f"--share: no public address was to be had. {why}")
            yield local, public
        finally:
            blocks.close(verbose=False)


def _not_for_visitors(folder: Path) -> list[str]:
    """Gradio would show files of the current folder, if a page ever gave it their names."""
    here = Path.cwd().resolve()
    return [] if folder.resolve().is_relative_to(here) else [str(here)]


@contextmanager
def _environment(folder: Path) -> Iterator[None]:
    """What libraries read: nothing is told to anybody, and all that is written goes to `folder`."""
    local = ",".join(filter(None, (os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), *LOOPBACK)))
    ours = {
        "GRADIO_ALLOWED_PATHS": "",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_EXAMPLES_CACHE": str(folder / "examples"),
        "GRADIO_TEMP_DIR": str(folder / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # Gradio asks itself whether it has begun, which no proxy is to be told.
        "NO_PROXY": local,
        "no_proxy": local,
    }
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _offline() -> Iterator[None]:
    """No request to the Hub from here on: what the operator has named is on this machine."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def _nothing_fetched() -> Iterator[None]:
    """Gradio fetches the address in the web that a request gives in place of a file, all by this library."""
    import safehttpx

    async def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError("this server fetches nothing from the web.")

    names = ("get", "async_validate_url")
    before = {name: getattr(safehttpx, name) for name in names}
    for name in names:
        setattr(safehttpx, name, refuse)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(safehttpx, name, function)


class _Ending:
    """Until `wait`, a signal to end is a `KeyboardInterrupt`; there it is the end of waiting, and the next one is what
    it was before."""

    def __init__(self) -> None:
        self._asked = self._waiting = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Ending:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # A shell that starts a job in the background has it ignore Ctrl-C.
            if number is not None and (before := signal.getsignal(number)) is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def wait(self) -> None:
        self._waiting = True
        # No event: the lock of one may be held by the very thread that the signal interrupts.
        while not self._asked:
            time.sleep(0.2)

    def _ask(self, _number: int, _frame: object) -> None:
        self.__exit__()
        self._asked = True
        if not self._waiting:
            raise KeyboardInterrupt
