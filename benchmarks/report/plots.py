"""The plots of a run: each call's bandwidth and ratios, bandwidth over size, and memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: there may be no display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .. import environment
from ..peers import COMPARED, COMPILED, EAGER, OURS
from ..records import Measurement, Row, Run
from ..tables import MIB
from ..traffic import DIRECTIONS
from .text import RATIO_HEADINGS

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p", "h", "d")
ROW_INCHES = 0.27
RATIO_TICKS = (
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.9,
    1,
    1.2,
    1.5,
    2,
    3,
    4,
    5,
    7,
    10,
    20,
    50,
    100,
)
FEW_RATIO_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0)


def draw_calls(run: Run, path: Path) -> None:
    """Above the minimal bytes over time, below the ratios, those of models too; forward left, with backward right."""
    rows = [row for row in run.rows if not row.series] or run.rows
    label = _labels(rows)
    names = list(dict.fromkeys(map(label, rows)))
    height = max(2.5, ROW_INCHES * len(names) + 1.2)
    figure, axes = plt.subplots(2, 2, figsize=(15, 2 * height + 0.6), sharey=True, squeeze=False)
    for column, direction in enumerate(DIRECTIONS):
        lines = [(names.index(label(row)), row) for row in rows if row.direction == direction]
        _rates(axes[0][column], lines, run)
        _ratios(axes[1][column], lines)
        for each in (axes[0][column], axes[1][column]):
            _finish(each, names)
        axes[0][column].set_title(direction)
    _save(figure, run, path)


def draw_series(run: Run, path: Path) -> None:
    """Bandwidth over the bytes that a call moves: a panel for each kind of call and direction, a line a contender."""
    curves = run.series
    figure, axes = plt.subplots(len(curves), 2, figsize=(13, 3.6 * len(curves) + 0.6), squeeze=False)
    for panels, (name, rows) in zip(axes, curves.items(), strict=True):
        for panel, direction in zip(panels, DIRECTIONS, strict=True):
            _curve(panel, [row for row in rows if row.direction == direction], run)
            panel.set_title(f"{name}, {rows[0].dtype}, {direction}", fontsize=10)
    _save(figure, run, path)


def _curve(axes: Axes, rows: Sequence[Row], run: Run) -> None:
    # Of several types the first alone: a panel has one line a contender.
    sized = [(row, (row.minimal_bytes or 0) / MIB) for row in rows if row.dtype == rows[0].dtype]
    for marker, contender in zip(MARKERS, run.contenders(), strict=False):
        points = [(size, rate) for row, size in sized if (rate := row.gigabytes_per_second(contender)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker + "-", label=contender, markersize=5, alpha=0.8)
    copy, launch = (run.environment.get(name) for name in ("copy_bytes_per_second", "launch_seconds"))
    if copy is not None:
        axes.axhline(copy / 1e9, color="black", linestyle="--", linewidth=1, label="a copy")
    if launch is not None:
        sizes = [size for _, size in sized]
        reached = [size * MIB / launch / 1e9 for size in sizes]
        axes.plot(sizes, reached, "k:", linewidth=1, label="one empty launch")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("MiB of minimal bytes", fontsize=9)
    axes.set_ylabel("GB/s (more is better)", fontsize=9)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    _label(axes)


def draw_memory(run: Run, path: Path) -> None:
    """Bytes kept for backward and allocated at most, a bar for each contender, calls above and models below."""
    parts = memory_rows(run)
    heights = [ROW_INCHES * 1.4 * len(rows) + 1.0 for rows in parts]
    figure, axes = plt.subplots(
        len(parts), 2, figsize=(15, sum(heights) + 0.6), squeeze=False, sharey="row", height_ratios=heights
    )
    for panels, rows in zip(axes, parts, strict=True):
        for panel, (what, read) in zip(panels, MEMORY.items(), strict=True):
            _bars(panel, rows, what, read)
    _save(figure, run, path)


def memory_rows(run: Run) -> list[list[Row]]:
    """Of the calls and of the models, where any, those of the first type that went backward."""
    kinds = ([row for row in rows if row.direction == DIRECTIONS[-1]] for rows in (run.calls, run.models))
    return [[row for row in rows if row.dtype == rows[0].dtype] for rows in kinds if rows]


MEMORY: Mapping[str, Callable[[Measurement], int | None]] = {
    "MiB kept for backward (less is better)": lambda found: found.kept_bytes,
    "MiB allocated at most during forward and backward (less is better)": lambda found: found.peak_bytes,
}


def _bars(axes: Axes, rows: Sequence[Row], what: str, read: Callable[[Measurement], int | None]) -> None:
    shown = [name for name in (OURS, EAGER, COMPILED) if any(_bytes(row, name, read) is not None for row in rows)]
    thickness = 0.8 / max(1, len(shown))
    for place, name in enumerate(shown):
        held = [(line, count) for line, row in enumerate(rows) if (count := _bytes(row, name, read)) is not None]
        heights = [line + thickness * (place - (len(shown) - 1) / 2) for line, _ in held]
        axes.barh(heights, [count / MIB for _, count in held], thickness, label=name)
    _finish(axes, [row.workload for row in rows])
    axes.set_xlabel(what, fontsize=9)


def _bytes(row: Row, contender: str, read: Callable[[Measurement], int | None]) -> int | None:
    found = row.measurement(contender)
    return None if found is None else read(found)


def _labels(rows: Sequence[Row]) -> Callable[[Row], str]:
    several_dtypes = len({row.dtype for row in rows}) > 1
    return lambda row: f"{row.workload} {row.dtype}" if several_dtypes else row.workload


def _save(figure: Figure, run: Run, path: Path) -> None:
    figure.suptitle(environment.sentence(run.environment), fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


Lines = Sequence[tuple[int, Row]]  # each row with its height in the plot


def _rates(axes: Axes, lines: Lines, run: Run) -> None:
    copy = run.environment.get("copy_bytes_per_second")
    if copy is not None:
        axes.axvline(copy / 1e9, color="black", linestyle="--", linewidth=1, label="a copy")
    for marker, contender in zip(MARKERS, run.contenders(), strict=False):
        points = [(rate, line) for line, row in lines if (rate := row.gigabytes_per_second(contender)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker, label=contender, markersize=6, alpha=0.75)
    axes.set_xlim(left=0)
    axes.set_xlabel("GB/s of minimal bytes (more is better)", fontsize=9)


def _ratios(axes: Axes, lines: Lines) -> None:
    held = [pair for pair in COMPARED if any(row.ratio(*pair) for _, row in lines)]
    extent = 1.5
    for place, (marker, pair) in enumerate(zip(MARKERS, held, strict=False)):
        axes.plot([], [], marker + "-", color=f"C{place}", label=RATIO_HEADINGS[pair])
        for line, row in lines:
            ratio = row.ratio(*pair)
            if ratio is None:
                continue
            height = line + 0.24 * (place - (len(held) - 1) / 2)
            if ratio.rounds is not None:
                axes.plot((ratio.rounds.lower, ratio.rounds.upper), (height, height), "-", color=f"C{place}", alpha=0.5)
            axes.plot(ratio.of_medians, height, marker, color=f"C{place}", markersize=5)
            extent = max(extent, 1.1 * ratio.of_medians, 1.1 / ratio.of_medians)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(1 / extent, extent)  # equal ways to both sides of 1; a far quartile may lie outside
    # Where a wide range leaves each less room, every other one.
    axes.xaxis.set_major_locator(FixedLocator(RATIO_TICKS if extent < 4 else FEW_RATIO_TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("time over the peer's: of medians, line between quartiles over rounds (less is better)", fontsize=9)


def _label(axes: Axes) -> None:
    """A legend, unless no contender was timed."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8, loc="best")


def _finish(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="both", color="0.9")
    axes.set_axisbelow(True)
    _label(axes)
