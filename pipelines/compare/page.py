"""A comparison as one HTML page that opens from a disk, without network: a slider between two variants, and figures."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from urllib.parse import quote

from . import text
from .figures import Comparison, Outcome, Shot, Summary
from .variants import Variant

# As text in the page. Beyond, browsers are slow, and mail and issue trackers refuse the page.
MOST_EMBEDDED = 60_000_000
MIME = {".png": "image/png", ".gif": "image/gif", ".mp4": "video/mp4"}
# Pixels; smaller pictures are shown larger, by a whole number.
SMALLEST_STAGE = 384


def render(comparison: Comparison, folder: Path, stitched: str | None = None) -> str:
    """The page.

    Args:
        folder: with the files of the outcomes, for those to be embedded.
        stitched: the name of the clip of all variants, if there is one.
    """
    files = [outcome.file for outcome in comparison.outcomes.values() if outcome.file]
    sources, embedded = sources_of(files, folder)
    title = f"attnswap compare: {comparison.about.get('model', '')}"
    template = Template(resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        heading=escape(title),
        summary=escape(", ".join(said for name, said in comparison.about.items() if name != "model")),
        table=_summary_table(comparison),
        shots="\n".join(_shot(comparison, shot, sources) for shot in comparison.begun),
        how=_how(comparison, stitched, embedded),
    )


def sources_of(files: Sequence[str], folder: Path) -> tuple[dict[str, str], bool]:
    """An address for every file, and whether all of them hold the file itself; else they name it, beside the page."""
    if sum((folder / file).stat().st_size for file in files) * 4 / 3 > MOST_EMBEDDED:
        return {file: quote(file) for file in files}, False
    return {
        file: f"data:{MIME[Path(file).suffix]};base64,{base64.b64encode((folder / file).read_bytes()).decode()}"
        for file in files
    }, True


def _summary_table(comparison: Comparison) -> str:
    several = len(comparison.shots) > 1
    summaries = {variant.name: comparison.summary(variant) for variant in comparison.variants}
    slowest = max((summary.seconds or 0 for summary in summaries.values()), default=0)
    rows = []
    for variant in comparison.variants:
        summary = summaries[variant.name]
        if summary.made:
            rows.append(_row(text.cells(comparison, variant.name, summary), summary.seconds, slowest))
        if summary.failed:
            tried = f"failed in {summary.failed} of {summary.made + summary.failed}: " if several else "failed: "
            rows.append(_failed_row(comparison, variant.name, tried + (summary.error or "")))
    return _table(comparison, "Medians over all prompts and seeds" if several else "", rows)


def _shot(comparison: Comparison, shot: Shot, sources: dict[str, str]) -> str:
    outcomes = [(variant, comparison.outcome(shot, variant)) for variant in comparison.variants]
    made = [(variant, outcome) for variant, outcome in outcomes if outcome and outcome.file]
    parts = [
        f'<section class="shot"><h2>{escape(shot.prompt)}</h2>',
        f'<p class="faint">{shot.number} of {len(comparison.shots)}, seed {shot.seed}</p>',
    ]
    parts.append('<div class="side">')
    if made:
        parts += _stage(comparison, shot, made, sources)
    if len(comparison.shots) > 1:
        parts.append(_shot_table(comparison, shot, outcomes))
    return "\n".join([*parts, "</div></section>"])


def _stage(
    comparison: Comparison, shot: Shot, made: Sequence[tuple[Variant, Outcome]], sources: dict[str, str]
) -> list[str]:
    """The pictures on top of each other, with what chooses and moves between them."""
    names = [variant.name for variant, _ in made]
    right = min(1, len(made) - 1)
    width, height = comparison.size
    scale = max(1, math.ceil(SMALLEST_STAGE / width))
    shape = f"--width: {width * scale}px; --ratio: {width} / {height}"
    media = []
    for number, (variant, outcome) in enumerate(made):
        side = "both" if number == right == 0 else "left" if number == 0 else "right" if number == right else ""
        source = sources[outcome.file or ""]
        given = f'data-variant="{number}" data-side="{side}" src="{source}"'
        if (outcome.file or "").endswith(".mp4"):
            label = escape(variant.name)
            media.append(f'<video {given} muted loop playsinline preload="auto" aria-label="{label}"></video>')
        else:
            media.append(f'<img {given} alt="{escape(variant.name)}" decoding="async">')
    label = escape(f"Where the left picture ends, prompt {shot.number}")
    lines = [
        f'<div class="looking" style="{shape}">',
        f'<div class="choice">{_select("left", names, 0)}{_select("right", names, right)}</div>',
        f'<div class="stage{" small" if scale > 1 else ""}">',
        *media,
        '<span class="line"></span>',
        f'<span class="tag left">{escape(names[0])}</span><span class="tag right">{escape(names[right])}</span>',
        f'<input class="cut" type="range" min="0" max="100" step="0.5" value="50" aria-label="{label}">',
        "</div>",
    ]
    if comparison.frames and comparison.fps and any(file.endswith(".mp4") for file in map(_file, made)):
        lines.append(
            f'<div class="player" data-fps="{float(Fraction(comparison.fps))}" '
            f'data-frames="{comparison.frames}"><button type="button">Play</button>'
            f'<input type="range" min="0" max="{comparison.frames - 1}" value="0" aria-label="Frame">'
            "<output></output></div>"
        )
    links = " · ".join(f'<a href="{quote(outcome.file or "")}">{escape(variant.name)}</a>' for variant, outcome in made)
    return [*lines, f'<p class="faint">Files beside this page: {links}</p></div>']


def _file(made: tuple[Variant, Outcome]) -> str:
    return made[1].file or ""


def _select(side: str, names: Sequence[str], chosen: int) -> str:
    options = "".join(
        f'<option value="{number}"{" selected" if number == chosen else ""}>{escape(name)}</option>'
        for number, name in enumerate(names)
    )
    return f'<label><span>{side}</span> <select autocomplete="off">{options}</select></label>'


def _shot_table(comparison: Comparison, shot: Shot, outcomes: Iterable[tuple[Variant, Outcome | None]]) -> str:
    found = list(outcomes)
    slowest = max((outcome.seconds or 0 for _, outcome in found if outcome), default=0)
    rows = []
    for variant, outcome in found:
        if outcome is None:
            rows.append(_failed_row(comparison, variant.name, "not run"))
        elif outcome.error is not None:
            rows.append(_failed_row(comparison, variant.name, f"failed: {outcome.error}"))
        else:
            cells = text.cells(comparison, variant.name, _alone(comparison, shot, variant))
            rows.append(_row(cells, outcome.seconds, slowest))
    return _table(comparison, "", rows)


def _table(comparison: Comparison, caption: str, rows: Sequence[str]) -> str:
    heads = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in text.headings(comparison))
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    body = "\n".join(rows)
    return f'<div class="wide"><table>{title}<thead><tr>{heads}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _row(cells: Sequence[str], seconds: float | None, slowest: float) -> str:
    name, time, *rest = map(escape, cells)
    share = 100 * (seconds or 0) / slowest if slowest else 0
    others = "".join(f"<td>{cell}</td>" for cell in rest)
    return f'<tr><th scope="row">{name}</th><td class="bar" style="--share: {share:.1f}%">{time}</td>{others}</tr>'


def _failed_row(comparison: Comparison, name: str, error: str) -> str:
    columns = len(text.headings(comparison)) - 1
    return f'<tr><th scope="row">{escape(name)}</th><td class="said bad" colspan="{columns}">{escape(error)}</td></tr>'


def _how(comparison: Comparison, stitched: str | None, embedded: bool) -> str:
    settings = f"<dt>date</dt><dd>{escape(comparison.date)}</dd>"
    versions = comparison.record.get("versions", {})
    settings += "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(version))}</dd>" for name, version in versions.items())
    notes = [note for variant in comparison.variants for note in text.notes_of(comparison, variant, variant.name)]
    if comparison.frames:
        beside = "sheet.png has the middle frames side by side" + (f", {stitched} the clips" if stitched else "")
    else:
        beside = "sheet.png has all pictures side by side"
    beside = f"{beside}; compare.json has every figure. Each file remembers how it was made: attnswap show FILE."
    if not embedded:
        beside += " The pictures are not in this page but beside it, as they are too large: keep the folder together."
    said = "".join(f"<p>{escape(line)}</p>" for line in (*notes, *text.remarks(comparison), beside))
    command = f"<pre>{escape(comparison.command)}</pre>" if comparison.command else ""
    return f"{command}<dl>{settings}</dl>{said}"


def _alone(comparison: Comparison, shot: Shot, variant: Variant) -> Summary:
    """The figures of one shot."""
    numbers = {
        (shot.number, name): outcome for (number, name), outcome in comparison.outcomes.items() if number == shot.number
    }
    return Comparison((shot,), comparison.variants, comparison.size, outcomes=numbers).summary(variant)
