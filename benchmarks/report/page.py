"""A run as a folder that can be read offline: plots, tables in Markdown, and one page that holds all of them."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from .. import counted, environment, tables
from ..records import Run
from ..tables import Column
from . import plots, text

# Of a ratio: where ours is faster, where it is as fast within what a CPU's clock tells apart, and where it is slower.
LIMITS = (("faster", 1.0), ("even", text.CPU_RATIO_LIMIT))


@dataclass(frozen=True)
class Cell:
    """What stands in a table of the page; kind: how a ratio is coloured."""

    text: str
    left: bool
    kind: str = ""


@dataclass(frozen=True)
class Table:
    """A table of the page under its heading."""

    heading: str
    head: list[Cell]
    rows: list[list[Cell]]
    opened: bool = True


def write(run: Run, folder: Path) -> list[Path]:
    """Writes the plots, report.md and index.html; returns their paths."""
    drawn = {
        "Bandwidth and ratios": ("calls.png", plots.draw_calls, bool(run.rows)),
        "Bandwidth over size": ("sizes.png", plots.draw_series, bool(run.series)),
        "Memory": ("memory.png", plots.draw_memory, bool(plots.memory_rows(run))),
    }
    pictures: dict[str, Path] = {}
    for heading, (name, draw, has_any) in drawn.items():
        if has_any:
            pictures[heading] = folder / name
            draw(run, folder / name)
    markdown, page = folder / "report.md", folder / "index.html"
    markdown.write_text(_markdown(run, pictures), encoding="utf-8")
    page.write_text(_page(run, pictures), encoding="utf-8")
    return [page, markdown, *pictures.values()]


def _markdown(run: Run, pictures: dict[str, Path]) -> str:
    paragraphs = [f"# {environment.device_and_date(run.environment)}", f"{environment.sentence(run.environment)}."]
    paragraphs += [f"- {remark}" for remark in text.remarks(run)]
    for heading, rows in text.parts(run).items():
        paragraphs += [f"## {heading}", text.markdown_table(run, rows)]
    paragraphs += [text.legend(run)]
    paragraphs += [f"## {heading}\n\n![{heading}]({path.name})" for heading, path in pictures.items()]
    if started := text.started(run):
        paragraphs += ["## First calls", tables.markdown(text.start_columns(started), started)]
    if run.counted or run.uncounted:
        paragraphs += ["## Counted, not timed", *counted.paragraphs(run, tables.markdown)]
    return "\n\n".join(paragraphs) + "\n"


def _page(run: Run, pictures: dict[str, Path]) -> str:
    found = [_table(heading, text.columns(run, rows), rows) for heading, rows in text.parts(run).items()]
    if started := text.started(run):
        found.append(_table("First calls, and what they compiled", text.start_columns(started), started, opened=False))
    if run.counted:
        of_gpu = "Counted, not timed: what a GPU would have to launch and move, at full size; no GPU ran"
        found.append(_table(of_gpu, counted.columns(run.counted), run.counted))
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return template.get_template("page.html.jinja").render(
        title=environment.device_and_date(run.environment),
        sentence=environment.sentence(run.environment),
        remarks=[*text.remarks(run), *counted.missing(run)],
        legend=text.legend(run),
        pictures={heading: base64.b64encode(path.read_bytes()).decode() for heading, path in pictures.items()},
        tables=found,
    )


def _table(heading: str, columns: Sequence[Column], rows: Sequence[object], opened: bool = True) -> Table:
    headings, body = tables.cells(columns, rows)
    head = [Cell(name, column.left) for name, column in zip(headings, columns, strict=True)]
    lines = [
        [Cell(cell, column.left, _kind(column.heading, cell)) for cell, column in zip(line, columns, strict=True)]
        for line in body
    ]
    return Table(heading, head, lines, opened)


def _kind(heading: str, cell: str) -> str:
    number = re.match(r"\d+\.\d+", cell)
    if heading not in (*text.RATIO_HEADINGS.values(), "ratio") or number is None:
        return ""
    return next((kind for kind, limit in LIMITS if float(number[0]) <= limit), "slower")
