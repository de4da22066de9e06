"""From a run to what people read: a table as text or Markdown, a plot, and the sentences around them.

`python -m benchmarks.report RUN.json` prints the table of an earlier run (--markdown: as Markdown).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import counted, environment, tables
from .peers import COMPARED, COMPILED, EAGER, LIBRARIES, OURS, OURS_COMPILED
from .records import Measurement, Ratio, Row, Run
from .tables import Column, call_columns, mebibytes, three_digits

# The most that our call may take of torch's on a CPU; the rows above it are named under the table.
CPU_RATIO_LIMIT = 1.05
# On a machine that does nothing else the quartiles lie some 5 % apart.
DISTURBED = 0.25

BROKEN = ("wrong", "failed")


def milliseconds(seconds: float) -> str:
    """Of a time, with three significant digits."""
    return three_digits(seconds * 1e3)


def _time(row: Row) -> str:
    found = row.measurement(OURS)
    if found is None or found.seconds is None:
        return "-" if found is None else found.status
    return milliseconds(found.seconds.median)


def _spread(row: Row) -> str:
    found = row.measurement(OURS)
    if found is None or found.seconds is None:
        return "-"
    return f"{(found.seconds.upper - found.seconds.lower) / found.seconds.median * 50:.0f}%"


def _rate(contender: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        rate = row.gigabytes_per_second(contender)
        return "-" if rate is None else f"{rate:.3g}" if rate < 100 else f"{rate:.0f}"

    return cell


def _ratio(contender: str, over: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        found = row.ratio(contender, over)
        if found is not None:
            return ratio_text(found)
        for name in (over, contender):
            gap = row.measurement(name)
            if gap is not None and gap.status in BROKEN:
                return "no compiler" if "CxxCompiler" in gap.reason else gap.status
        return "-"

    return cell


def ratio_text(ratio: Ratio) -> str:
    """The ratio of medians, and the quartiles over rounds where there are any."""
    if ratio.rounds is None:
        return f"{ratio.of_medians:.2f}"
    return f"{ratio.of_medians:.2f} ({ratio.rounds.lower:.2f}-{ratio.rounds.upper:.2f})"


def _bytes(read: Callable[[Measurement], int | None]) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        ours, eager = row.measurement(OURS), row.measurement(EAGER)
        mine, theirs = (None if found is None else read(found) for found in (ours, eager))
        return "-" if mine is None and theirs is None else f"{mebibytes(mine)} / {mebibytes(theirs)}"

    return cell


def _host(row: Row) -> str:
    found = row.measurement(OURS)
    return "-" if found is None or found.host_seconds is None else f"{found.host_seconds.median * 1e6:.0f}"


RATIO_HEADINGS = {
    (OURS, EAGER): "ours/eager",
    (OURS, COMPILED): "ours/compile",
    (OURS_COMPILED, COMPILED): "both compiled",
    **{(OURS, library.NAME): f"ours/{library.NAME}" for library in LIBRARIES},
}


def _says_something(row: Row, pair: tuple[str, str]) -> bool:
    found = (row.measurement(name) for name in pair)
    return row.ratio(*pair) is not None or any(gap is not None and gap.status in BROKEN for gap in found)


def columns(run: Run) -> list[Column[Row]]:
    """Those that hold something: a peer that is not here at all is told under the table instead."""
    held = [pair for pair in COMPARED if any(_says_something(row, pair) for row in run.rows)]
    chosen = [
        *call_columns(run.rows),
        Column("ours ms", _time),
        Column("+-", _spread),
        Column("GB/s", _rate(OURS)),
        Column("eager", _rate(EAGER)),
        *(Column(RATIO_HEADINGS[pair], _ratio(*pair)) for pair in held),
        Column("peak MiB o/e", _bytes(lambda found: found.peak_bytes)),
        Column("kept MiB o/e", _bytes(lambda found: found.kept_bytes)),
    ]
    if any(found.host_seconds is not None for row in run.rows for found in row.measurements):
        chosen.append(Column("host us", _host))
    return chosen


def text_table(run: Run) -> str:
    """For a terminal; what a workload's rows share is shown once."""
    return tables.text(columns(run), run.rows)


def markdown_table(run: Run) -> str:
    """The same cells for a document."""
    return tables.markdown(columns(run), run.rows)


def gaps(run: Run) -> list[str]:
    """What was not timed, and why: one line a contender and reason, with the rows where they are not all."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in run.rows:
        for measurement in row.measurements:
            if measurement.status != "timed":
                key = (measurement.contender, measurement.status, measurement.reason)
                found.setdefault(key, []).append(f"{row.workload} {row.direction}")
    lines = []
    for (contender, status, reason), rows in found.items():
        where = "every row" if len(rows) == len(run.rows) else f"{len(rows)} rows"
        if len(rows) <= 3 and len(rows) < len(run.rows):
            where = ", ".join(rows)
        lines.append(f"{contender}: {status} on {where}: {reason}")
    return lines


def verdicts(run: Run) -> list[str]:
    """Of each pair compared, on how many rows the first takes at most CPU_RATIO_LIMIT of the second, and the others."""
    lines = []
    for pair in ((OURS, EAGER), (OURS_COMPILED, COMPILED)):
        found = [(row, ratio) for row in run.rows if (ratio := row.ratio(*pair)) is not None]
        if not found:
            continue
        above = [(row, ratio) for row, ratio in found if round(ratio.of_medians, 2) > CPU_RATIO_LIMIT]
        line = f"{pair[0]} / {pair[1]}: at most {CPU_RATIO_LIMIT} on {len(found) - len(above)} of {len(found)} rows"
        named = (f"{row.workload} {row.dtype} {row.direction} {ratio.of_medians:.2f}" for row, ratio in above)
        lines.append(line + ("; above on " + ", ".join(named) if above else ""))
    return lines


def disturbance(run: Run) -> list[str]:
    """Says so where the machine did other things meanwhile."""
    spreads = [
        (found.seconds.upper - found.seconds.lower) / found.seconds.median
        for row in run.rows
        if (found := row.measurement(OURS)) is not None and found.seconds is not None
    ]
    disturbed = sum(spread > DISTURBED for spread in spreads)
    if not disturbed:
        return []
    return [
        f"{disturbed} of {len(spreads)} rows were disturbed (quartiles more than {DISTURBED:.0%} of the median apart): "
        "something else used the machine, and ratios of those rows mean little."
    ]


def legend(run: Run) -> str:
    """How to read the table."""
    dtypes = " and ".join(dict.fromkeys(row.dtype for row in run.rows))
    return (
        f"{dtypes}. ours ms: median; +-: half the distance between the quartiles; GB/s: minimal bytes over the median "
        "(benchmarks/traffic.py);\nratios under 1: the first is faster (between the quartiles over rounds); "
        "o/e: ours / torch eager; peak: allocated during the call; kept: held for backward."
    )


def summary(run: Run) -> str:
    """The table with all that belongs beside it."""
    parts = [text_table(run), "", legend(run), *verdicts(run), *disturbance(run), *gaps(run)]
    return "\n".join([*parts, f"Figures from: {environment.sentence(run.environment)}."])


def ending(run: Run) -> list[str]:
    """What follows all else: the counted table, where there is one."""
    paragraphs = counted.paragraphs(run)
    return ["", *paragraphs] if paragraphs else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints an earlier run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("run", type=Path, help="a JSON file that benchmarks.run wrote")
    parser.add_argument("--markdown", action="store_true", help="the table as Markdown")
    parser.add_argument("--plot", type=Path, help="also draw the plot into this file")
    options = parser.parse_args(arguments)
    run = Run.read(options.run)
    if options.markdown:
        print("\n\n".join([markdown_table(run), *counted.paragraphs(run, tables.markdown)]))
    else:
        print("\n".join([summary(run), *ending(run)]))
    if options.plot:
        from .plots import draw

        draw(run, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
