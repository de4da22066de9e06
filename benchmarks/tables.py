"""Tables of rows of any kind: the columns say what of a row they show, the functions here how it is laid out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from .records import Call

R = TypeVar("R")
C = TypeVar("C", bound=Call)

MIB = 2**20


@dataclass(frozen=True)
class Column(Generic[R]):
    """A heading, what a row shows under it, and to which side.

    once: a text table leaves it blank in a row that shows the same in all such columns as the row above.
    """

    heading: str
    cell: Callable[[R], str]
    left: bool = False
    once: bool = False


def call_columns(rows: Sequence[C]) -> list[Column[C]]:
    """Which call a row is about; its type only where rows differ in it."""
    several_dtypes = len({row.dtype for row in rows}) > 1
    return [
        Column("workload", lambda row: row.workload, left=True, once=True),
        Column("shape", lambda row: "x".join(map(str, row.shape)), left=True, once=True),
        *([Column("dtype", lambda row: row.dtype, left=True)] if several_dtypes else []),
        Column("pass", lambda row: {"forward": "fwd", "forward+backward": "fwd+bwd"}[row.direction], left=True),
    ]


def text(columns: Sequence[Column[R]], rows: Sequence[R]) -> str:
    """Aligned columns for a terminal."""
    headings, body = cells(columns, rows)
    widths = [max(map(len, texts)) for texts in zip(headings, *body, strict=True)]
    lines = [headings, ["-" * width for width in widths]]
    shown: list[str] = []
    for texts in body:
        before, shown = shown, [cell for cell, column in zip(texts, columns, strict=True) if column.once]
        repeats = shown == before
        lines.append(["" if repeats and column.once else cell for cell, column in zip(texts, columns, strict=True)])
    return "\n".join(_line(columns, widths, texts) for texts in lines)


def markdown(columns: Sequence[Column[R]], rows: Sequence[R]) -> str:
    """The same cells for a document."""
    headings, body = cells(columns, rows)
    rule = ["---" if column.left else "---:" for column in columns]
    return "\n".join(f"| {' | '.join(texts)} |" for texts in (headings, rule, *body))


def cells(columns: Sequence[Column[R]], rows: Sequence[R]) -> tuple[list[str], list[list[str]]]:
    """The headings, and what each row shows under them."""
    return [column.heading for column in columns], [[column.cell(row) for column in columns] for row in rows]


def _line(columns: Sequence[Column[R]], widths: Sequence[int], texts: Sequence[str]) -> str:
    padded = (
        cell.ljust(width) if column.left else cell.rjust(width)
        for column, width, cell in zip(columns, widths, texts, strict=True)
    )
    return "  ".join(padded).rstrip()


def three_digits(value: float) -> str:
    """Three significant digits: 0.0123, 1.23, 123."""
    for limit, digits in ((0.1, 4), (1, 3), (10, 2), (100, 1)):
        if value < limit:
            return f"{value:.{digits}f}"
    return f"{value:.0f}"


def mebibytes(count: int | None) -> str:
    """With one digit, and none for what is no number."""
    return "-" if count is None else f"{count / MIB:.1f}"
