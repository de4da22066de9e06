"""What a run measured, as data: written to JSON and read back, and all that a report is made of."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SCHEMA = 1
# timed, or a stated gap: unavailable (not here), skipped (not asked for), wrong (results differ), failed (it raised).
Status = Literal["timed", "unavailable", "skipped", "wrong", "failed"]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `count` samples."""

    median: float
    lower: float
    upper: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """From the samples; a single one is its own quartiles."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, lower, upper, len(samples))


@dataclass(frozen=True)
class Measurement:
    """One contender on one row. Nothing but `reason` is set where it is not timed.

    error: the largest error of its results as a share of what is allowed. host_seconds: what the call takes on the
    host of a GPU. peak_bytes: allocated at most during the call, beyond its inputs. kept_bytes: held for backward.
    """

    contender: str
    status: Status
    reason: str = ""
    seconds: Spread | None = None
    host_seconds: Spread | None = None
    method: str = ""
    error: float | None = None
    peak_bytes: int | None = None
    kept_bytes: int | None = None


@dataclass(frozen=True)
class Ratio:
    """Time of one contender over another's: the ratio of their medians, and the spread over rounds where they were
    timed side by side."""

    contender: str
    over: str
    of_medians: float
    rounds: Spread | None = None


@dataclass(frozen=True)
class Call:
    """One workload at one size and type in one direction."""

    workload: str
    function: str
    shape: tuple[int, ...]
    dtype: str
    direction: str


@dataclass(frozen=True)
class Row(Call):
    """A call as its contenders were measured."""

    minimal_bytes: int
    launch_bound: bool = False
    measurements: list[Measurement] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)

    def measurement(self, contender: str) -> Measurement | None:
        """The contender's, or None where it was not declared for this run."""
        return next((found for found in self.measurements if found.contender == contender), None)

    def ratio(self, contender: str, over: str) -> Ratio | None:
        """The ratio, or None where one of the two was not timed."""
        return next((found for found in self.ratios if (found.contender, found.over) == (contender, over)), None)

    def gigabytes_per_second(self, contender: str) -> float | None:
        """Minimal bytes over the median time."""
        found = self.measurement(contender)
        return None if found is None or found.seconds is None else self.minimal_bytes / found.seconds.median / 1e9


@dataclass(frozen=True)
class Counts:
    """What one call takes of a GPU: launches, bytes they move, and, where a backward follows, bytes held for it."""

    launches: int
    moved_bytes: int
    kept_bytes: int | None = None


@dataclass(frozen=True)
class CountedRow(Call):
    """A call as it was counted, which takes no GPU."""

    ours: Counts
    eager: Counts


@dataclass(frozen=True)
class Run:
    """All rows, and the machine and versions they are from.

    counted: on a CPU, what the same workloads would take of a GPU. uncounted: why some or all of it is missing.
    """

    environment: dict[str, Any]
    rows: list[Row]
    counted: list[CountedRow] = field(default_factory=list)
    uncounted: str = ""

    def contenders(self) -> list[str]:
        """Names in the order of their first appearance."""
        return list(dict.fromkeys(found.contender for row in self.rows for found in row.measurements))

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Run:
        """The inverse of `write`; ValueError for another schema."""
        data = json.loads(path.read_text())
        if data.get("schema") != SCHEMA:
            raise ValueError(f"{path} must have schema {SCHEMA}, but has {data.get('schema')}; run the benchmark again")
        rows = [_row(row) for row in data["rows"]]
        counted = [_counted_row(row) for row in data.get("counted", [])]  # files of before it was counted have none
        return cls(data["environment"], rows, counted, data.get("uncounted", ""))


def _spread(data: dict[str, Any] | None) -> Spread | None:
    return None if data is None else Spread(**data)


def _row(data: dict[str, Any]) -> Row:
    measurements = [
        Measurement(**{**found, "seconds": _spread(found["seconds"]), "host_seconds": _spread(found["host_seconds"])})
        for found in data["measurements"]
    ]
    ratios = [Ratio(**{**found, "rounds": _spread(found["rounds"])}) for found in data["ratios"]]
    return Row(**{**data, "shape": tuple(data["shape"]), "measurements": measurements, "ratios": ratios})


def _counted_row(data: dict[str, Any]) -> CountedRow:
    counts = {name: Counts(**data[name]) for name in ("ours", "eager")}
    return CountedRow(**{**data, "shape": tuple(data["shape"]), **counts})
