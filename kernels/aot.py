"""Ahead-of-time check of the Triton kernels: compile what is shipped for every target, on any machine.

    python -m attnswap.kernels.aot                          print the table
    python -m attnswap.kernels.aot --write docs/kernels.md  and put it into the page, between its markers

No GPU is needed. Registers, spills and shared memory are read from the binaries. The exit status is 1 when a shipped
configuration spills registers or needs more shared memory than its target has.

A kernel takes part by being registered: the module of each operation's Triton implementation has a function
``shipped()`` that returns its `targets.Shipped`.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import dispatch
from .targets import Shipped

BEGIN, END = "<!-- begin: python -m attnswap.kernels.aot -->", "<!-- end -->"
COLUMNS = ("kernel", "target", "dtype", "variant", "tile", "warps", "stages", "registers", "spills", "shared KiB")


@dataclass(frozen=True)
class Usage:
    """Registers per thread, spills (bytes on NVIDIA, registers on AMD) and bytes of shared memory of one binary."""

    registers: int
    spills: int
    shared: int


def shipped() -> list[Shipped]:
    """What every registered operation ships, in a fixed order."""
    implementations = (dispatch.get_op(name).implementations.get("triton") for name in dispatch.ops())
    modules = {entry.target.partition(":")[0] for entry in implementations if entry is not None}
    return [entry for module in sorted(modules) for entry in importlib.import_module(module).shipped()]


def measure(entry: Shipped) -> Usage:
    """Compile one entry and read what its binary takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = entry.kernel.arg_names
    signature = {name: entry.signature.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    constants = {name: entry.constants[name] for name in names if signature[name] == "constexpr"}
    compiled = triton.compile(
        ASTSource(entry.kernel, signature, constants, aligned),
        target=GPUTarget(entry.target.backend, entry.target.arch, entry.target.warp_size),
        options={"num_warps": entry.config.num_warps, "num_stages": entry.config.num_stages},
    )
    registers, spills = _amd_registers(compiled) if entry.target.backend == "hip" else _nvidia_registers(compiled)
    return Usage(registers, spills, compiled.metadata.shared)


def _nvidia_registers(compiled: Any) -> tuple[int, int]:
    """Registers and bytes of stack and local memory, which is where ptxas spills to."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        listing = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", listing.stdout + listing.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resource usage: {listing.stdout} {listing.stderr}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _amd_registers(compiled: Any) -> tuple[int, int]:
    """Vector registers, and those of them that spill; scalar registers spill into vector ones, not into memory."""
    counts = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", compiled.asm["amdgcn"]))
    return int(counts["vgpr_count"]), int(counts["vgpr_spill_count"])


def problems(entry: Shipped, usage: Usage) -> list[str]:
    """What makes a configuration unfit to ship."""
    found = []
    if usage.spills:
        found.append(f"spills {usage.spills}")
    if usage.shared > entry.target.shared_limit:
        found.append(
            f"needs {usage.shared} bytes of shared memory, {entry.target.name} has {entry.target.shared_limit}"
        )
    return [f"{' '.join(_identity(entry))}: {text}" for text in found]


def _identity(entry: Shipped) -> tuple[str, ...]:
    config = entry.config
    return (
        entry.kernel.__name__,
        entry.target.name,
        entry.dtype,
        entry.variant,
        f"{config.block_m}x{config.block_n}",
        str(config.num_warps),
        str(config.num_stages),
    )


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(entries: list[Shipped], usages: list[Usage]) -> str:
    """The Markdown table of docs/kernels.md."""
    rows = [_row(COLUMNS), _row(("---",) * len(COLUMNS))]
    for entry, usage in zip(entries, usages, strict=True):
        measured = (str(usage.registers), str(usage.spills), f"{usage.shared / 1024:.1f}")
        rows.append(_row((*_identity(entry), *measured)))
    return "\n".join(rows)


def insert(page: str, text: str) -> str:
    """The page with `text` between its markers."""
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page must hold the markers {BEGIN!r} and {END!r} once each")
    head, _, rest = page.partition(BEGIN)
    return f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"


def _measure_at(index: int) -> Usage:
    return measure(shipped()[index])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m attnswap.kernels.aot", description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the markers of this page")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    options = parser.parse_args(arguments)
    if dispatch.triton_interprets():
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    entries = shipped()
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        usages = []
        for usage in pool.map(_measure_at, range(len(entries))):
            usages.append(usage)
            print(f"\r{len(usages)}/{len(entries)} compiled", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    if options.write is None:
        print(table(entries, usages))
    else:
        options.write.write_text(insert(options.write.read_text(encoding="utf-8"), table(entries, usages)), "utf-8")
    unfit = [text for entry, usage in zip(entries, usages, strict=True) for text in problems(entry, usage)]
    for text in unfit:
        print(text, file=sys.stderr)
    return 1 if unfit else 0


if __name__ == "__main__":
    sys.exit(main())
