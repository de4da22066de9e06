"""What an audit prints and writes: a table, what exceeds an allowance, JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tables import MIB, Column, call_columns, text, three_digits
from .findings import Finding
from .rows import AuditRow
from .sweep import Spill
from .targets import DEVICES

LEGEND = """\
moved: bytes of distinct addresses of every launch, of a second walk again where it leaves the L2; least: the fewest
that the call can move; asked: bytes asked for. instr: instructions that threads issue for each element of x; regs: a
thread's, the most of the call's kernels; spill: bytes a thread; 16 B: share of the bytes that are accessed 16 a thread
at a time; in flight: loads on their way on a multiprocessor, the fewest of the kernels; comp: compilations of a kernel
over row counts. host: Python of one call whose launches cost nothing, and over that of torch eager's chain. estimate:
by a model from these counts for the {device}, and what bounds it; no measurement."""


@dataclass(frozen=True)
class Audit:
    """Everything that one run found. swept: entries of the launch tables compiled, on all targets together."""

    environment: dict[str, Any]
    rows: list[AuditRow]
    findings: list[Finding]
    spills: list[Spill]
    swept: int = 0

    @property
    def passed(self) -> bool:
        return not (self.findings or self.spills)

    def write(self, path: Path) -> None:
        """As JSON, with what follows from a row beside it."""
        data = dataclasses.asdict(self)
        for row, written in zip(self.rows, data["rows"], strict=True):
            written.update(
                moved_bytes=row.moved_bytes, asked_bytes=row.asked_bytes, estimated_seconds=row.seconds, limit=row.limit
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, indent=1) + "\n")


def columns(rows: Sequence[AuditRow]) -> list[Column[AuditRow]]:
    """The columns of the table."""
    chosen: list[Column[AuditRow]] = [
        *call_columns(rows),
        Column("launches", lambda row: str(len(row.launches))),
        Column("moved MiB", lambda row: three_digits(row.moved_bytes / MIB)),
        Column("/ least", lambda row: f"{row.moved_bytes / row.least_bytes:.2f}"),
        Column("asked / moved", lambda row: f"{row.asked_bytes / row.moved_bytes:.2f}"),
        Column("instr", lambda row: f"{sum(launch.instructions for launch in row.launches):.1f}"),
        Column("regs", lambda row: str(max(launch.registers for launch in row.large))),
        Column("spill", lambda row: str(sum(launch.compiled.spilled_bytes for launch in row.launches))),
        Column("16 B", lambda row: f"{min(launch.wide_share for launch in row.large):.0%}"),
        Column("in flight KiB", _in_flight),
        Column("comp", lambda row: str(row.compilations)),
    ]
    if any(row.host for row in rows):
        chosen.append(Column("host us", lambda row: f"{row.host.ours * 1e6:.0f}" if row.host else "-"))
        chosen.append(Column("/ eager", lambda row: f"{row.host.ratio:.2f}" if row.host else "-"))
    chosen.append(Column("estimate us", lambda row: three_digits(row.seconds * 1e6)))
    chosen.append(Column("by", lambda row: row.limit, left=True))
    return chosen


def _in_flight(row: AuditRow) -> str:
    multiprocessors = DEVICES[row.device].facts.multiprocessors
    return f"{min(launch.bytes_in_flight(multiprocessors) for launch in row.large) / 1024:.0f}"


def summary(audit: Audit) -> str:
    """The table, how to read it, and what exceeds an allowance."""
    parts = []
    if audit.rows:
        devices = " and ".join(dict.fromkeys(row.device for row in audit.rows))
        parts += [text(columns(audit.rows), audit.rows), "", LEGEND.format(device=devices)]
    if audit.swept:
        parts.append(f"Launch tables: {audit.swept} entries compiled, {len(audit.spills)} kernels spill.")
    for title, found in (("Above an allowance", audit.findings), ("Spills in the launch tables", audit.spills)):
        if found:
            parts += [f"{title}: {len(found)}", *(f"  {each}" for each in found)]
    parts.append("Every allowance holds." if audit.passed else "docs/audit.md tells what to do about each.")
    return "\n".join(parts)
