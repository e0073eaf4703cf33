"""`attnswap demo`: a page in the browser for pictures, clips and comparisons."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import threading
from typing import Any

from .common import MODELS, Listing, quieten
from .job_options import DTYPES

# Seconds of silence after which a terminal shows that something goes on.
PATIENCE = 2.0
# Flags that are called as the fields of a job.
FIELDS = ("device", "dtype", "variant", "cpu_offload", "vae_tiling", "low_memory")


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        usage="attnswap demo [options]",
        help="open a page for pictures, clips and comparisons in the browser",
        description="A page in the browser: make pictures and clips, compare methods, look inside them. It runs on\n"
        "this machine alone, one job at a time; what visitors make is removed when it ends.",
        epilog="e.g. attnswap demo --open\n"
        "     attnswap demo -m stable-diffusion-v1-5/stable-diffusion-v1-5 --low-memory\n"
        "     attnswap demo --host 0.0.0.0 --auth ann:secret --max-size 1024 --max-steps 30",
        formatter_class=Listing,
    )
    model = parser.add_argument_group("models")
    model.add_argument(
        "-m", "--model", action="append", default=[], help=f"{MODELS}; again for more (all that are bundled are there)"
    )
    model.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="NAME",
        help="of a method, to choose from by this NAME; again for more",
    )
    model.add_argument("--variant", help='weight variant of the models, such as "fp16"')
    model.add_argument("--dtype", choices=DTYPES, metavar="DTYPE", help="auto, fp32, fp16 or bf16 (default: auto)")
    model.add_argument("--device", help="cpu, cuda, cuda:1, mps … (default: the accelerator, else the CPU)")
    model.add_argument(
        "--cpu-offload", choices=("model", "group"), metavar="BY", help="model or group: on the CPU until needed"
    )
    model.add_argument("--vae-tiling", action="store_true", default=None, help="decode in tiles: less memory")
    model.add_argument(
        "--low-memory", action="store_true", default=None, help="slower: guidance halves and more in parts"
    )

    limits = parser.add_argument_group("what a visitor may ask for, at most")
    limits.add_argument("--max-size", type=int, default=4096, metavar="PX", help="width and height (default: 4096)")
    limits.add_argument("--max-frames", type=int, default=257, metavar="N", help="of a clip (default: 257)")
    limits.add_argument("--max-steps", type=int, default=100, metavar="N", help="denoising steps (default: 100)")

    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for the whole network (default: 127.0.0.1)")
    server.add_argument("--port", type=int, default=7860, help="0 for any that is free (default: 7860)")
    server.add_argument("--auth", metavar="USER:PASSWORD", help="ask visitors for these")
    server.add_argument("--share", action="store_true", help="a public address, too, by way of Gradio's servers")
    server.add_argument("--open", action="store_true", help="open it in the browser")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..demo import serve

    serve.check(options.host, options.port, options.auth)  # at once: what follows takes its time to be imported
    from ..demo.server.limits import Limits
    from ..pipelines.job import Job
    from ..pipelines.printable import printable_lines

    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # before the first library that reads it
    limits = Limits(max_size=options.max_size, max_frames=options.max_frames, max_steps=options.max_steps)
    given = {name: value for name in FIELDS if (value := getattr(options, name)) is not None}
    quieten(progress=False)  # downloads show theirs all the same

    def say(text: str) -> None:
        starting.cancel()
        print(printable_lines(text), flush=True)

    def log(line: str) -> None:
        print(printable_lines(f"{datetime.datetime.now():%H:%M:%S} {line}"), file=sys.stderr, flush=True)

    starting = threading.Timer(PATIENCE, say, ["attnswap demo: starting ..."])
    starting.daemon = True
    if sys.stdout.isatty():
        starting.start()
    try:
        serve.serve(
            options.model,
            Job("", **given),
            limits,
            weights=options.weights,
            host=options.host,
            port=options.port,
            auth=options.auth,
            share=options.share,
            open_browser=options.open,
            say=say,
            log=log,
        )
    finally:
        starting.cancel()
    return 0
