"""A run as tables, of text or Markdown, and the sentences around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from .. import counted, environment, tables
from ..peers import AUTOTUNED, COMPARED, COMPILED, EAGER, LIBRARIES, OURS, OURS_COMPILED
from ..records import Measurement, Ratio, Row, Run
from ..tables import Column, call_columns, mebibytes, three_digits

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


def _of_copy(run: Run) -> Callable[[Row], str]:
    copy = run.environment.get("copy_bytes_per_second")

    def cell(row: Row) -> str:
        rate = row.gigabytes_per_second(OURS)
        return "-" if rate is None or copy is None else f"{rate * 1e9 / copy:.0%}"

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
    (OURS, AUTOTUNED): "ours/autotune",
    **{(OURS, library.NAME): f"ours/{library.NAME}" for library in LIBRARIES},
}


def _says_something(row: Row, pair: tuple[str, str]) -> bool:
    found = (row.measurement(name) for name in pair)
    return row.ratio(*pair) is not None or any(gap is not None and gap.status in BROKEN for gap in found)


def columns(run: Run, rows: Sequence[Row]) -> list[Column[Row]]:
    """Those that hold something: a peer that is not here at all is told under the table instead."""
    held = [pair for pair in COMPARED if any(_says_something(row, pair) for row in rows)]
    bounded = any(row.minimal_bytes is not None for row in rows)
    chosen = [
        *call_columns(rows),
        Column("ours ms", _time),
        Column("+-", _spread),
        *([Column("GB/s", _rate(OURS)), Column("of copy", _of_copy(run))] if bounded else []),
        *(Column(RATIO_HEADINGS[pair], _ratio(*pair)) for pair in held),
        Column("peak MiB o/e", _bytes(lambda found: found.peak_bytes)),
        Column("kept MiB o/e", _bytes(lambda found: found.kept_bytes)),
    ]
    if any(found.host_seconds is not None for row in rows for found in row.measurements):
        chosen.append(Column("host us", _host))
    return chosen


def started(run: Run) -> list[Row]:
    """The rows whose first calls are known, which older runs are without."""
    return [row for row in run.rows if any(found.first_seconds is not None for found in row.measurements)]


def start_columns(rows: Sequence[Row]) -> list[Column[Row]]:
    """What the first call of each contender took, and what it compiled."""
    called = (found for row in rows for found in row.measurements if found.first_seconds is not None)
    names = dict.fromkeys(found.contender for found in called)
    return [*call_columns(rows), *(Column(f"{name} ms (compiled)", _first(name)) for name in names)]


def _first(contender: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        found = row.measurement(contender)
        if found is None or found.first_seconds is None:
            return "-"
        return f"{milliseconds(found.first_seconds)} ({found.compilations})"

    return cell


def parts(run: Run) -> dict[str, list[Row]]:
    """The rows of a run under the headings of a report, those that it has."""
    found = {
        "Calls": run.calls,
        "Whole models": run.models,
        **{f"Over sizes: {series}": rows for series, rows in run.series.items()},
    }
    return {heading: rows for heading, rows in found.items() if rows}


def text_table(run: Run, rows: Sequence[Row] | None = None) -> str:
    """For a terminal; what a workload's rows share is shown once."""
    rows = run.rows if rows is None else rows
    return tables.text(columns(run, rows), rows)


def markdown_table(run: Run, rows: Sequence[Row] | None = None) -> str:
    """The same cells for a document."""
    rows = run.rows if rows is None else rows
    return tables.markdown(columns(run, rows), rows)


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


def noise(run: Run) -> list[str]:
    """How quiet the machine was: the distance of the quartiles, and a copy at the end beside one at the beginning."""
    spreads = [
        (found.seconds.upper - found.seconds.lower) / found.seconds.median
        for row in run.rows
        if (found := row.measurement(OURS)) is not None and found.seconds is not None
    ]
    if not spreads:
        return []
    line = f"Noise: ours' quartiles lie {median(spreads) / 2:.1%} to both sides on a row in the middle"
    line += f", {max(spreads) / 2:.0%} on the worst"
    before, after = (run.environment.get(f"copy_bytes_per_second{when}") for when in ("", "_after"))
    if before and after:
        line += f"; a copy at the end ran at {after / before:.0%} of its rate at the beginning"
    disturbed = sum(spread > DISTURBED for spread in spreads)
    if not disturbed:
        return [f"{line}."]
    return [
        f"{line}.",
        f"{disturbed} of {len(spreads)} rows were disturbed (quartiles more than {DISTURBED:.0%} of the median apart): "
        "something else used the machine, and ratios of those rows mean little.",
    ]


def ceilings(run: Run) -> list[str]:
    """What was measured beside the rows to hold them against."""
    copy, launch = (run.environment.get(name) for name in ("copy_bytes_per_second", "launch_seconds"))
    found = [] if copy is None else [f"a copy moves {copy / 1e9:.3g} GB/s, read and written"]
    found += [] if launch is None else [f"an empty launch takes {launch * 1e6:.2f} us"]
    return [f"In the same run {' and '.join(found)}."] if found else []


def remarks(run: Run) -> list[str]:
    """The sentences beside the tables, each a line."""
    return [*ceilings(run), *verdicts(run), *noise(run), *gaps(run)]


def legend(run: Run) -> str:
    """How to read the table."""
    dtypes = " and ".join(dict.fromkeys(row.dtype for row in run.rows))
    return (
        f"{dtypes}. ours ms: median; +-: half the distance between the quartiles; GB/s: minimal bytes over the median "
        "(benchmarks/traffic.py);\nof copy: their share of a copy's, which is above 1 where a cache holds the tensors; "
        "ratios under 1: the first is faster (between the\nquartiles over rounds); o/e: ours / torch eager; peak: "
        "allocated during the call; kept: held for backward. A model's ours: after fuse."
    )


def summary(run: Run) -> str:
    """The tables with all that belongs beside them."""
    found = parts(run)
    lines = []
    for heading, rows in found.items():
        lines += [*([heading] if len(found) > 1 else []), text_table(run, rows), ""]
    lines += [legend(run), *remarks(run)]
    return "\n".join([*lines, f"Figures from: {environment.sentence(run.environment)}."])


def ending(run: Run) -> list[str]:
    """What follows all else: the counted table, where there is one."""
    paragraphs = counted.paragraphs(run)
    return ["", *paragraphs] if paragraphs else []
