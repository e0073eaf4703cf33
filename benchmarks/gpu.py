"""Everything that only a GPU can tell, in one command and one JSON file: the kernel tests, then the timings.

    python benchmarks/gpu.py            from a checkout, nothing installed: torch 2.11, triton 3.6 and pytest are enough

The bundled models are timed too where diffusers is installed.

Exit status 0: all right; 1: a test failed, or a kernel of ours broke or gave wrong numbers; 2: no CUDA here, or wrong
use. The JSON is written in the first two cases.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnswap.benchmarks.result import Result

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_BUDGET_S = 540
# The tests may not eat the time of the measurements.
TESTS_SHARE = 0.4
# Of the time that the tests leave; the models take what the operations leave.
OPS_SHARE = 0.75
MODELS = ("emoji-sd", "emoji-flux", "emoji-video")
TESTS = ("-m", "gpu", "tests/kernels")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.py", description="Test and time the kernels on a CUDA GPU.")
    parser.add_argument("--json", type=Path, metavar="PATH", help="default: benchmarks/results/gpu-DEVICE-DATE.json")
    parser.add_argument(
        "--budget",
        type=float,
        default=DEFAULT_BUDGET_S,
        metavar="SECONDS",
        help="time for tests and timings; cases that do not fit are left out and named (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        import torch
    except ImportError:
        return _wrong("torch is not installed; a build with CUDA is needed")
    if not torch.cuda.is_available():
        return _wrong(f"no CUDA device: torch {torch.__version__} sees none, and nothing here runs without one")
    target = options.json or _default_path(torch.cuda.get_device_name())
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        return _wrong(f"cannot write {target}: {target.parent} is no folder that can be written to")
    with tempfile.TemporaryDirectory() as folder:
        # The checkout's root is the package, whatever the checkout's folder is called. The link comes first on the
        # path, so what is tested and timed is this checkout even where another one is installed.
        Path(folder, "attnswap").symlink_to(ROOT, target_is_directory=True)
        tests = run_tests(Path(folder), timeout_s=options.budget * TESTS_SHARE)
        print(f"tests: {tests['summary']}", flush=True)
        if __package__ in (None, ""):
            # Run as a script, Python put this very folder on the path; its module names are too common to stay there.
            sys.path[0] = folder
        result = time_ops((options.budget - (time.monotonic() - started)) * OPS_SHARE).with_tests(tests)
        for number, model in enumerate(MODELS):
            result.write(target)  # whatever a model does, the kernels are timed
            left = options.budget - (time.monotonic() - started)
            result = time_model(result, model, left / (len(MODELS) - number))
        result.write(target)
        print(result.table())
    return _verdict(result, target, time.monotonic() - started)


def run_tests(package_folder: Path, *, timeout_s: float) -> dict[str, Any]:
    """The kernel tests marked `gpu`, in a process of their own: one that breaks the device leaves the timings alone."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *TESTS]
    path = os.pathsep.join(filter(None, (str(package_folder), os.environ.get("PYTHONPATH"))))
    begun = time.monotonic()
    try:
        finished = subprocess.run(
            command,
            cwd=ROOT,
            # Safe path: the checkout as current folder would offer `kernels` and others as top-level modules.
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        status, output = finished.returncode, finished.stdout
    except subprocess.TimeoutExpired as error:
        partial = error.stdout or b""
        output = partial.decode(errors="replace") if isinstance(partial, bytes) else partial
        status, output = 124, f"{output}\nnot finished after {timeout_s:.0f} s"
    if status != 0:
        print(output, flush=True)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return {
        "command": f"pytest {' '.join(TESTS)}",
        "exit_status": status,
        "summary": lines[-1] if lines else "no output",
        "failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
        "seconds": round(time.monotonic() - begun, 1),
    }


def time_ops(budget_s: float) -> Result:
    # Not relative: as a script, this file is in no package.
    from attnswap.benchmarks import runner

    return runner.run(None, device="cuda", budget_s=budget_s, progress=runner.print_progress)


def time_model(result: Result, model: str, budget_s: float) -> Result:
    """`result`, and a bundled model with every method, as `attnswap bench --model` times it."""
    from attnswap.benchmarks.result import Cut

    if importlib.util.find_spec("diffusers") is None:
        return dataclasses.replace(result, cut=(*result.cut, Cut(model, "all", "all", "diffusers is not installed")))
    from attnswap.benchmarks import models, runner

    return result.plus(models.run(model, device="cuda", budget_s=budget_s, progress=runner.print_progress))


def _default_path(device: str) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return ROOT / "benchmarks" / "results" / f"gpu-{slug}-{datetime.date.today().isoformat()}.json"


def _verdict(result: Result, target: Path, seconds: float) -> int:
    broken = [f"{record.case}, {record.dtype}, {m.contender}: {m.reason}" for record, m in result.broken()]
    for line in broken:
        print(f"broken: {line}")
    tests_failed = bool(result.tests and result.tests["exit_status"])
    if tests_failed:
        print("broken: the kernel tests failed")
    print(f"wrote {target} after {seconds:.0f} s")
    return 1 if broken or tests_failed else 0


def _wrong(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
