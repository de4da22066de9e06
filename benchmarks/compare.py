"""`python -m benchmarks.compare A B`: two runs side by side; which rows of ours became slower from A to B.

Machines are shared and differ from hour to hour. A row is therefore judged by ours over torch eager's in the same run,
and counts as changed where that moved by more than LIMIT and by more than the two runs' own uncertainty.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import environment, tables
from .peers import EAGER, OURS
from .records import Call, Row, Run, Spread
from .report.text import BROKEN, milliseconds
from .tables import Column

LIMIT = 0.05
# Of a difference of two medians whose standard errors add up: one in some hundred rows is further off by chance.
STANDARD_ERRORS = 2.5


@dataclass(frozen=True)
class Change(Call):
    """A row that both runs have timed. factor: ours in B over ours in A, each over torch eager's where both have it.
    uncertainty: how far off the factor may be by chance."""

    before: Spread
    after: Spread
    factor: float
    uncertainty: float

    @property
    def verdict(self) -> str:
        """slower, faster, or nothing."""
        least = max(LIMIT, self.uncertainty)
        return "slower" if self.factor > 1 + least else "faster" if self.factor < 1 - least else ""


def compare(a: Run, b: Run) -> list[Change]:
    """The rows that both have, in the order of B."""
    of_a = {_key(row): row for row in a.rows}
    changes = (_change(of_a[_key(row)], row) for row in b.rows if _key(row) in of_a)
    return [change for change in changes if change is not None]


def broken(a: Run, b: Run) -> list[Row]:
    """The rows of B whose call of ours is wrong or failed, and was timed in A."""
    timed = {_key(row) for row in a.rows if _seconds(row, OURS) is not None}
    return [
        row
        for row in b.rows
        if _key(row) in timed and (found := row.measurement(OURS)) is not None and found.status in BROKEN
    ]


def _key(row: Row) -> tuple[object, ...]:
    return row.workload, row.shape, row.dtype, row.direction


def _change(before: Row, after: Row) -> Change | None:
    ours = [_seconds(row, OURS) for row in (before, after)]
    eager = [_seconds(row, EAGER) for row in (before, after)]
    if ours[0] is None or ours[1] is None:
        return None
    factor, spreads = ours[1].median / ours[0].median, [ours[0], ours[1]]
    if eager[0] is not None and eager[1] is not None:
        factor *= eager[0].median / eager[1].median
        spreads += [eager[0], eager[1]]
    uncertainty = STANDARD_ERRORS * sum(spread.precision**2 for spread in spreads) ** 0.5
    call = (after.workload, after.function, after.shape, after.dtype, after.direction)
    return Change(*call, ours[0], ours[1], factor, uncertainty)


def _seconds(row: Row, contender: str) -> Spread | None:
    found = row.measurement(contender)
    return None if found is None else found.seconds


COLUMNS: Sequence[Column[Change]] = (
    Column("A ms", lambda change: milliseconds(change.before.median)),
    Column("B ms", lambda change: milliseconds(change.after.median)),
    Column("B/A", lambda change: f"{change.factor:.2f}"),
    Column("+-", lambda change: f"{change.uncertainty:.2f}"),
    Column("", lambda change: change.verdict, left=True),
)


def report(a: Run, b: Run, table: Callable[[Sequence[Column[Change]], Sequence[Change]], str] = tables.text) -> str:
    """The table, what the runs are, and the rows that became slower by name."""
    changes = compare(a, b)
    lines = [table([*tables.call_columns(changes), *COLUMNS], changes), ""] if changes else []
    lines += [f"{name}: {environment.sentence(run.environment)}." for name, run in (("A", a), ("B", b))]
    lines.append("B/A: of ours, each over torch eager's in its own run where both have it.")
    others = [f"{len(run.rows) - len(changes)} others in {name}" for name, run in (("A", a), ("B", b))]
    lines.append(f"{len(changes) or 'No'} rows that both have timed, {', '.join(others)}.")
    for verdict, word in (("faster", "Faster"), ("slower", "Slower")):
        found = [change for change in changes if change.verdict == verdict]
        named = ", ".join(f"{row.workload} {row.dtype} {row.direction} {row.factor:.2f}" for row in found)
        lines.append(f"{word} on {len(found)}{': ' + named if named else ''}.")
    lines += [f"{row.workload} {row.dtype} {row.direction} is broken in B." for row in broken(a, b)]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints; 1 where a row became slower, or is broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("a", type=Path, help="the run before")
    parser.add_argument("b", type=Path, help="the run after")
    parser.add_argument("--markdown", action="store_true", help="the table as Markdown")
    options = parser.parse_args(arguments)
    a, b = Run.read(options.a), Run.read(options.b)
    print(report(a, b, tables.markdown if options.markdown else tables.text))
    return int(bool(broken(a, b)) or any(change.verdict == "slower" for change in compare(a, b)))


if __name__ == "__main__":
    sys.exit(main())
