"""Renders docs/benchmarks.md from the timings in benchmarks/results/: `python -m attnswap.benchmarks.render`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .machine import ROOT
from .result import Measurement, Record, Result
from .table import (
    LEGEND,
    WORK_HEADINGS,
    WORK_LEGEND,
    case_title,
    cells,
    growth_line,
    has_row,
    has_work,
    headings,
    not_timed,
    target_line,
    work_rows,
)

RESULTS = ROOT / "benchmarks" / "results"
FILES = ("cpu-*.json", "gpu-*.json", "model-*.json")
PAGE = ROOT / "docs" / "benchmarks.md"

# A load average above this share of the cores means that others were at work.
BUSY = 0.3

INTRODUCTION = """\
# Benchmarks

<!-- Rendered from benchmarks/results/ by `python -m attnswap.benchmarks.render`. Do not edit. -->

How fast the operations in `attnswap.kernels` are, against what PyTorch offers for the same tensors. Every figure on
this page comes from a file `benchmarks/results/cpu-*.json`, `gpu-*.json` or `model-*.json`, written by a command that
stands at the end of this page."""

METHOD = f"""\
## How it is measured

- **Same tensors, same run.** All contenders of a case get the same query, key and value and are called in turn (A B C A
  B C …), so that a drift of the machine hits all alike. Only ratios within one table mean anything. The tensors are
  random; for block-sparse attention on a CPU they are a smooth random field over the grid of a clip, finer from head to
  head, so that a search finds something, and its masks are those that are timed. On a GPU the masks are random.
- **Three kinds of contenders.** *attnswap …* are this package's backends. *SDPA on windows* and *FlexAttention* give
  the same result by PyTorch's own code: SDPA gets tensors that already lie window by window and never brings them
  back, which a model would have to pay for; FlexAttention's compiling and block mask are not timed. The *published
  form* of linear attention is that of LinFusion's code, in plain PyTorch. *Dense SDPA* is full attention over all
  tokens: another result, and what a stock pipeline runs.
- **Three calls of block-sparse attention.** *density d* is attention by a mask of which each row keeps the share d of
  the key blocks, blocks of 64 x 64 tokens where nothing else is said, and all blocks with text; making the lists of
  kept blocks is part of it. *search* finds the scores of all blocks, with the log-sum-exp of a step before, and has no
  values and no output. *dense and search* gives the scores and dense attention's output in one.
- **Right first.** Before it is timed, a contender is compared with the reference in higher precision, on the first
  and the last head of the batch; local and block-sparse attention at about 64 and 48 tokens of these two heads, a
  search at three rows of blocks. Its relative error
  ‖out − exact‖ / ‖exact‖ may be at most twice that of plain PyTorch in the same dtype; one that is over is reported as
  wrong and not timed. Dense SDPA is PyTorch's own and not checked. Errors are in the JSON.
- **Median.** After a warm-up, the median of 5 to 100 calls, with the fastest and the slowest. On a GPU by CUDA
  events, with the L2 cache flushed before each call; on a CPU by the wall clock.
- **The ideal.** The least floating-point operations (two matrix products per window, or with a D x D matrix per token;
  a search takes one per pair of tokens) over the peak, or the least bytes (inputs read once, output written once) over
  the bandwidth, whichever takes longer. Peak and bandwidth are measured in the same run, with a large matrix product of
  the same dtype and a large copy; no data sheet is involved. Exponentials are left out, so that 100% is out of reach.
  Linear attention on a GPU is bound by the bandwidth, so that there the share of the ideal is the share of the
  bandwidth.
- **Work.** Circular local attention computes whole tiles and throws away what lies outside of the circle. For it, the
  operations that a backend executes are counted, as for FlexAttention the blocks of 128 x 128 tokens of which any is
  in sight. FlexAttention and dense attention get the same tensors, 512 text tokens before the grid. FlexAttention's
  mask is in the form that it runs fastest on a CPU (coordinates looked up), on a GPU in the published one. Block-sparse
  attention computes the blocks of its mask and no others: the speed-up that the work allows is one over the density,
  text included, and *of that* is the speed-up times the density.
- **Memory.** Peak MiB is the most that PyTorch's allocator holds during a call beyond the inputs, output included.
- **Growth.** Where cases differ in the number of tokens alone, the exponent of a power law is fitted to the
  medians from 16384 tokens up (4096 for local attention), by least squares on logarithms.
- **Extrapolated.** A contender that would take too long, more than 10 s a call on a CPU or 1 s on a GPU, is not called
  there. Its row then has its time at the largest size measured, times the ratio of the tokens to the power given in the
  JSON (dense attention 2, FlexAttention 1.5, the eager road of local attention on a GPU 1), and says so. No ratio is
  taken against it.
- **Whole models.** A table that names a model times one call of its denoiser at the first step of a run or, where it
  says so, a whole picture or clip from prompt to pixels, at 8 times the side in 3 steps and at 4 times the frames in 6;
  stock against each method with the settings that the model ships. AdaSpa is dense at the first step and then searches:
  of it, the call of a *sparse step* is timed, after one that searches and is not; whole clips have both. Swapping in
  and out is not timed; only time is compared.
- **Nothing dropped.** A contender that could not run stands below its table with the reason.

{LEGEND}

{WORK_LEGEND}"""

NO_GPU = """\
## GPU

No GPU has been measured yet. This page makes no claim about the speed of any GPU, and the Triton kernels stand in none
of its tables."""

REPRODUCE = """\
## How to reproduce

    attnswap bench --op linear_attention --json FILE      one operation, on the GPU where there is one, else the CPU
                                                          (window_attention, linear_attention, local_attention or
                                                          block_sparse)
    attnswap bench --model emoji-sd --method linfusion --json FILE      a model, with chosen methods or all
    python -m attnswap.benchmarks.runner --json FILE      all operations
    python benchmarks/gpu.py                              on a CUDA machine, from a checkout, without installing: the
                                                          kernel tests, then all timings
    python -m attnswap.benchmarks.render                  renders this page from benchmarks/results/

`benchmarks/gpu.py` needs torch 2.11, triton 3.6 and pytest, or newer, and writes
`benchmarks/results/gpu-DEVICE-DATE.json`."""


def render(results: Mapping[str, Result]) -> str:
    """The whole page; `results` by file name."""
    parts = [INTRODUCTION, METHOD]
    ordered = [results[name] for name in sorted(results)]
    gpus = [result for result in ordered if result.device["type"] == "cuda"]
    cpus = [result for result in ordered if result.device["type"] == "cpu"]
    parts += ["\n".join(["## GPU", *map(_section, gpus)]) if gpus else NO_GPU]
    parts += ["\n".join(["## CPU", *map(_section, cpus)]) if cpus else "## CPU\n\nNo CPU has been measured yet."]
    return "\n\n".join([*parts, REPRODUCE]) + "\n"


def read_results(folder: Path = RESULTS) -> dict[str, Result]:
    """The timings in `folder`, by file name; files of other names hold other things and have pages of their own."""
    return {path.name: Result.read(path) for name in FILES for path in folder.glob(name)}


def _section(result: Result) -> str:
    return "\n".join(_section_lines(result))


def _section_lines(result: Result) -> Iterator[str]:
    device = dict(result.device)
    yield from ("", f"### {device.pop('name')}, {result.date}", "")
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in device.items() if name != "type")
    yield f"- Machine: {facts}"
    yield f"- Versions: {', '.join(f'{name} {version}' for name, version in result.versions.items())}"
    yield f"- Commit: {result.commit or 'unknown'}"
    for dtype, ceiling in result.ceilings.items():
        flops, bandwidth = ceiling["flops_per_second"] / 1e12, ceiling["bytes_per_second"] / 1e9
        yield f"- Measured ceilings, {dtype}: {flops:.3g} TFLOP/s, {bandwidth:.3g} GB/s"
    if result.tests:
        yield f"- Kernel tests on this device: {result.tests['summary']}"
    if result.quick:
        yield "- **A quick run**: few rounds, to see that it works, not to quote"
    if device["type"] == "cpu" and device["load_average"] > BUSY * device["cores"]:
        yield "- **The machine was busy with other work** at the time: only the ratios between contenders mean anything"
    for benchmark in dict.fromkeys(record.benchmark for record in result.records):
        yield from ("", f"#### {benchmark}")
        for record in result.records:
            if record.benchmark == benchmark:
                yield from _case_lines(record)
        yield from _work_lines([r for r in result.records if r.benchmark == benchmark and has_work(r)])
        remarks = [growth_line(growth) for growth in result.growths if growth.benchmark == benchmark]
        remarks += [target_line(target) for target in result.targets if target.benchmark == benchmark]
        if remarks:
            yield ""
            yield from (f"- {line}" for line in remarks)
    if result.cut:
        yield from ("", "Left out:", "")
        yield from (f"- {cut.benchmark}, {cut.case}, {cut.dtype}: {cut.reason}" for cut in result.cut)


def _case_lines(record: Record) -> Iterator[str]:
    timed = [measurement for measurement in record.measurements if has_row(measurement)]
    yield from ("", case_title(record), "")
    if timed:
        yield _row(headings(record))
        yield _row(("---", *["---:"] * (len(headings(record)) - 1)))
        yield from (_row(_emphasised(record, measurement)) for measurement in timed)
    untimed = [measurement for measurement in record.measurements if not has_row(measurement)]
    if untimed:
        yield ""
        yield from (f"- {not_timed(measurement)}" for measurement in untimed)


def _work_lines(records: Sequence[Record]) -> Iterator[str]:
    if not records:
        return
    yield from ("", "Executed and ideal work:", "")
    yield _row(("case", "contender", *WORK_HEADINGS[1:]))
    yield _row(("---", "---", *["---:"] * (len(WORK_HEADINGS) - 1)))
    for record in records:
        yield from (_row((record.case, *cells)) for cells in work_rows(record))


def _emphasised(record: Record, measurement: Measurement) -> tuple[str, ...]:
    first, *rest = cells(record, measurement)
    return (f"**{first}**" if measurement.role == "ours" else first, *rest)


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(text.replace('|', chr(92) + '|') for text in texts)} |"


def main() -> int:
    PAGE.write_text(render(read_results()), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
