"""The plot of a run: bandwidth of each contender, and ours over each peer, one line a workload."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: there may be no display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from . import environment
from .peers import COMPARED
from .records import Row, Run
from .report import RATIO_HEADINGS
from .traffic import DIRECTIONS

MARKERS = ("o", "s", "^", "D", "v", "P")
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


def draw(run: Run, path: Path) -> None:
    """Writes the PNG: above the minimal bytes over time, below the ratios; forward left, forward and backward right."""
    several_dtypes = len({row.dtype for row in run.rows}) > 1

    def label(row: Row) -> str:
        return f"{row.workload} {row.dtype}" if several_dtypes else row.workload

    names = list(dict.fromkeys(label(row) for row in run.rows))
    height = max(2.5, ROW_INCHES * len(names) + 1.2)
    figure, axes = plt.subplots(2, 2, figsize=(15, 2 * height + 0.6), sharey=True, squeeze=False)
    for column, direction in enumerate(DIRECTIONS):
        lines = [(names.index(label(row)), row) for row in run.rows if row.direction == direction]
        _rates(axes[0][column], lines, run.contenders())
        _ratios(axes[1][column], lines)
        for each in (axes[0][column], axes[1][column]):
            _finish(each, names)
        axes[0][column].set_title(direction)
    figure.suptitle(environment.sentence(run.environment), fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


Lines = Sequence[tuple[int, Row]]  # each row with its height in the plot


def _rates(axes: Axes, lines: Lines, contenders: Sequence[str]) -> None:
    for marker, contender in zip(MARKERS, contenders, strict=False):
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


def _finish(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="both", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, loc="best")
