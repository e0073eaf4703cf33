"""The `attnswap` command: reads the arguments, calls `pipelines`, prints what came of it.

Exit status: 0 done, 1 the job failed, 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipelines.generate import Result
    from .pipelines.job import Job

# Nothing heavy is imported before the arguments are understood: --help and wrong use answer at once.
ROUTES = {
    "direct": "one run at the size asked for",
    "ladder": "a base near the native size, then image-to-image in stages",
    "superres": "a base, enlarged once, its layout kept (SD 1.5, 2.1, XL)",
    "superres-ladder": "the same in stages (SD 1.5, 2.1, XL)",
}
DTYPES = ("auto", "float16", "fp16", "bfloat16", "bf16", "float32", "fp32")


def main(arguments: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console that lacks a character must not end the job
    options = build_parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        return _fail("interrupted; no file was left half-written.", 130)
    except BrokenPipeError:
        return 1
    except Exception as error:
        from .accel.errors import UnsupportedModel, WeightsError
        from .pipelines.errors import BadInput, JobFailed

        if isinstance(error, BadInput | UnsupportedModel | WeightsError):
            return _fail(str(error), 2)
        if isinstance(error, JobFailed):
            return _fail(str(error), 1)
        raise  # a defect of ours or of a library: the traceback is the report


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="attnswap", description="Fast attention for stock Diffusers pipelines.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_inspect(commands)
    _add_bench(commands)
    _add_distill(commands)
    doctor = commands.add_parser("doctor", help="show versions, devices and which backends would run")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        usage="attnswap generate PROMPT [options]",
        help="make one picture from a prompt",
        description="Make one picture from a prompt. What is not given comes from the model's preset.",
        epilog='example: attnswap generate "a fox" --width 256 --height 256 --method hidiffusion',
        formatter_class=_Listing,
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to show")
    parser.add_argument("-o", "--output", metavar="FILE", help="PNG to write (default: attnswap-TIME-SEED.png)")
    parser.add_argument("--from", dest="source", metavar="FILE", help="make a picture again from its own PNG")
    parser.add_argument("--report", metavar="FILE", help="also write a JSON report there ('-': standard output)")

    model = parser.add_argument_group("model")
    model.add_argument("-m", "--model", help="bundled name, folder or Hub id (default: emoji-sd)")
    model.add_argument("--variant", help='weight variant, such as "fp16"')
    model.add_argument("--dtype", choices=DTYPES, metavar="DTYPE", help="auto, fp32, fp16 or bf16 (default: auto)")
    model.add_argument("--device", help="cpu, cuda, cuda:1, mps … (default: the accelerator, else the CPU)")
    model.add_argument(
        "--cpu-offload", choices=("model", "group"), metavar="BY", help="model or group: on the CPU until needed"
    )
    model.add_argument("--vae-tiling", action="store_true", default=None, help="decode in tiles: less memory")
    model.add_argument(
        "--low-memory",
        action="store_true",
        default=None,
        help="slower: guidance halves, feed-forward and autoencoder in parts",
    )

    method = parser.add_argument_group("method")
    method.add_argument("--method", metavar="NAME[,NAME]", help="what accelerates the attention (default: nothing)")
    method.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the method; again for more"
    )

    picture = parser.add_argument_group("picture")
    picture.add_argument("--width", type=int, metavar="PX")
    picture.add_argument("--height", type=int, metavar="PX")
    picture.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    picture.add_argument("--guidance", type=float, metavar="X", help="guidance scale")
    picture.add_argument("--negative", metavar="PROMPT", help="what not to show")
    picture.add_argument("--seed", type=int, metavar="N", help="same seed, same picture (default: 0)")

    routes = "\n".join(f"{name:16} {what}" for name, what in ROUTES.items())
    route = parser.add_argument_group("above the native size, by one of these routes", routes)
    route.add_argument("--route", choices=ROUTES, metavar="ROUTE", help="one of the above (default: direct)")
    route.add_argument("--strengths", type=_numbers, metavar="X[,X]", help="one a stage above the base, 0 to 1")
    route.add_argument("--keep-stages", action="store_true", help="leave the pictures of the stages behind")
    parser.set_defaults(run=_generate)


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="show which attention layers a method would accelerate",
        description="A dry run: every attention layer, accelerated (+) or not (-), and why. Reads no weights.",
    )
    parser.add_argument("model", metavar="MODEL", help="bundled name, folder or Hub id")
    parser.add_argument("--method", metavar="NAME[,NAME]", help="default: every method")
    parser.set_defaults(run=_inspect)


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="time the kernels, or a model, on this machine",
        description="Time the kernels, or a whole model with every method, against dense attention.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--op", action="append", metavar="NAME", help="an op to time; again for more (default: all)")
    what.add_argument("--model", metavar="MODEL", help="time this model instead: bundled name, folder or Hub id")
    parser.add_argument("--method", metavar="NAME[,NAME]", help="with --model: these methods only (default: every one)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="time every case in this dtype")
    parser.add_argument("--quick", action="store_true", help="few cases, few rounds: not for quoting")
    parser.add_argument("--json", metavar="FILE", help="also write the result there")
    parser.set_defaults(run=_bench)


def _add_distill(commands: Any) -> None:
    distill = commands.add_parser("distill", help="train the weights of a method for a model of yours")
    methods = distill.add_subparsers(title="methods", metavar="METHOD", required=True)
    parser = methods.add_parser(
        "linfusion",
        usage="attnswap distill linfusion -o FOLDER (--steps N | --minutes M) [--data DATA] [options]",
        help="linear attention for a U-Net (SD 1.5, SD 2.1, SDXL)",
        description="Train linear attention to do what the self-attention of a U-Net does. Writes the weights "
        "(use them as --set weights=FOLDER), a report with loss curves and pictures, and a checkpoint.",
        epilog="Several processes: accelerate launch -m attnswap.cli distill linfusion …",
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="where weights, report and checkpoint go"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder")

    data = parser.add_argument_group("model and data")
    data.add_argument("-m", "--model", default="emoji-sd", help="bundled name, folder or Hub id (default: emoji-sd)")
    data.add_argument("--variant", help='weight variant, such as "fp16"')
    data.add_argument(
        "--data",
        help="a folder of pictures with captions (fox.txt beside fox.png, or metadata.jsonl with file_name and text); "
        "or a text file, one caption a line, or the word captions for those a bundled model comes with: then the "
        "model first draws the pictures itself, into FOLDER/data (default: captions)",
    )
    data.add_argument("--per-caption", type=int, metavar="N", help="pictures it draws a caption (default: 1)")
    data.add_argument("--size", type=int, metavar="PX", help="short side and crop (default: the model's own)")
    data.add_argument("--workers", type=int, metavar="N", help="processes that read pictures (default: 0)")

    run = parser.add_argument_group("training")
    run.add_argument("--steps", type=int, metavar="N", help="length of the run, resumed parts included")
    run.add_argument("--minutes", type=float, metavar="M", help="the same by time; whichever ends first")
    run.add_argument("--batch", type=int, metavar="N", help="pictures a process takes at once (default: 4)")
    run.add_argument("--accumulate", type=int, metavar="N", help="such batches a step (default: 1)")
    run.add_argument("--rate", type=float, metavar="X", help="learning rate (default: 1e-4)")
    run.add_argument(
        "--loss-weights",
        type=_numbers,
        metavar="X,X,X",
        help="of the data, the teacher's prediction and the teacher's layers in the loss (default: 1,0.5,0.5)",
    )
    run.add_argument("--mid", metavar="WIDTH", help="of the MLPs: C, C/N or a number (default: C; SDXL C/16)")
    run.add_argument("--caption-dropout", type=float, metavar="P", help="share of captions left out (default: 0)")
    run.add_argument("--ema", type=float, metavar="DECAY", help="save an average of the weights (default: none)")
    run.add_argument("--seed", type=int, metavar="N", help="same seed, same run (default: 0)")
    run.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints (default: 500)")
    run.add_argument("--report-pictures", type=int, metavar="N", help="pairs drawn for the report (default: 6)")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), help="weights in training stay fp32")
    machine.add_argument("--gradient-checkpointing", action="store_true", default=None, help="slower: less memory")
    machine.add_argument("--cpu", action="store_true", default=None, help="train on the CPU")
    parser.set_defaults(run=_distill_linfusion)


def _generate(options: argparse.Namespace) -> int:
    from .pipelines import save
    from .pipelines.errors import BadInput, JobFailed
    from .pipelines.generate import generate

    job = _job(options)
    report_path = Path(options.report) if options.report not in (None, "-") else None
    if report_path:
        save.check_writable(report_path, ".json")
        if report_path.resolve() == job.output.resolve():
            raise BadInput(f"--report {report_path}: that is the picture.")
    progress = sys.stderr.isatty()
    _quieten(progress)
    result = generate(job, progress=progress, say=lambda text: print(f"attnswap: {text}", file=sys.stderr))
    print(_summary(result), file=sys.stderr if options.report == "-" else sys.stdout)
    if options.report == "-":
        print(json.dumps(_report(result), indent=2, ensure_ascii=False))
    elif report_path:
        try:
            save.write_json(_report(result), report_path)
        except OSError as error:
            raise JobFailed(f"{report_path} could not be written: {error.strerror or error}") from error
    return 0


def _job(options: argparse.Namespace) -> Job:
    from .pipelines import save, settings
    from .pipelines.errors import BadInput
    from .pipelines.job import Job, again, from_record

    record = save.read_record(Path(options.source)) if options.source else None
    names = (
        "prompt", "model", "variant", "dtype", "device", "cpu_offload", "vae_tiling", "low_memory",
        "width", "height", "steps", "guidance", "negative", "seed", "route", "strengths",
    )  # fmt: skip
    changes = {name: value for name in names if (value := getattr(options, name)) is not None}
    if options.method is not None or options.set:
        stored = from_record(record)["methods"] if record else {}
        methods = _names(options.method) if options.method is not None else list(stored)
        changes["methods"] = settings.parse(methods, options.set)
    fields = again(record, changes) if record else changes
    if "prompt" not in fields:
        raise BadInput("no PROMPT given, and no --from FILE to take it from.")
    if options.output:
        output = Path(options.output)
    else:
        output = Path(f"attnswap-{datetime.datetime.now():%Y%m%d-%H%M%S}-{fields.get('seed', 0)}.png")
    return Job(**fields, output=output, keep_stages=options.keep_stages)


def _summary(result: Result) -> str:
    job = result.job
    peak = f", peak memory {result.peak_bytes / 2**20:.0f} MiB" if result.peak_bytes else ""
    return "\n".join(
        [
            f"{job.output}: {job.width}x{job.height}, {job.steps} steps, seed {job.seed}",
            *(f"{job.route}, {stage}" for stage in result.stages if stage.total > 1),
            f"{result.seconds:.1f} s on {result.device}{peak}",
            str(result.report) if result.report else "dense attention (no --method)",
        ]
    )


def _report(result: Result) -> dict[str, Any]:
    return {
        "file": str(result.job.output),
        "seconds": result.seconds,
        "peak_bytes": result.peak_bytes,
        "job": result.record,
        "report": result.report.to_dict() if result.report else None,
        "notices": list(result.notices),
    }


def _inspect(options: argparse.Namespace) -> int:
    from . import inspect, methods
    from .accel.errors import UnsupportedModel
    from .pipelines import load, settings, skeleton

    names = _names(options.method) if options.method is not None else list(methods())
    settings.parse(names, [])
    _quieten(sys.stderr.isatty())
    model = load.find(options.model, weights=False)
    denoisers = skeleton.skeletons(model)
    applicable = 0
    for part, denoiser in denoisers.items():
        for name in names:
            try:
                text = str(inspect(denoiser, name))
                applicable += 1
            except UnsupportedModel as error:
                text = f"{name}: does not apply. {error}"
            print(f"{part}: {text}")
    if not applicable:
        raise UnsupportedModel(f"no method applies to {model.name} ({', '.join(model.denoisers.values())}).")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from .benchmarks import models, runner
    from .pipelines import save
    from .pipelines.errors import BadInput

    if options.json:
        save.check_writable(Path(options.json), ".json")
    if options.method is not None and not options.model:
        raise BadInput("--method goes with --model: an op is timed with every backend.")
    how = {"device": options.device, "dtype": options.dtype, "quick": options.quick}
    try:
        if options.model:
            _quieten(sys.stderr.isatty())
            names = _names(options.method) if options.method is not None else None
            result = models.run(options.model, methods=names, **how, progress=runner.print_progress)
        else:
            result = runner.run(options.op, **how, progress=runner.print_progress)
    except ValueError as error:
        raise BadInput(str(error)) from error
    print(result.table())
    if options.json:
        result.write(options.json)
    return 0


def _distill_linfusion(options: argparse.Namespace) -> int:
    from .training.distill import distill
    from .training.distill_report import write_report
    from .training.distill_settings import Settings

    given = {name: value for name, value in vars(options).items() if name != "run" and value is not None}
    progress = sys.stderr.isatty()
    _quieten(progress)
    run = distill(
        Settings(**{**given, "output": Path(options.output)}),
        progress=progress,
        say=lambda text: print(f"attnswap: {text}", file=sys.stderr, flush=True),
    )
    if run is None:  # not the first of several processes
        return 0
    report = write_report(run)
    psnr = f", {report['psnr_to_teacher']} dB to the teacher's pictures" if "psnr_to_teacher" in report else ""
    print(f"{options.output}: {report['steps']} steps, {report['pictures']} pictures, {report['seconds']:.0f} s{psnr}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from .pipelines import doctor

    print(doctor.screen())
    return 0


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are not numbers separated by commas") from None


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _quieten(progress: bool) -> None:
    """Libraries keep to warnings about this job, and draw bars only where somebody is looking."""
    import diffusers.utils.logging
    import transformers.utils.logging

    transformers.utils.logging.set_verbosity_error()  # its advice on optional packages is not for our users
    if not progress:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


class _Parser(argparse.ArgumentParser):
    """Wrong use is one line, not the whole usage."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Listing(argparse.RawDescriptionHelpFormatter):
    """For a help with a list in it, which must stay one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from . import __version__

        print(f"attnswap {__version__}")
        parser.exit()


def _fail(message: str, status: int) -> int:
    print(f"attnswap: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
