"""What a run measured, as data: written as lines of JSON and read back, and all that a report is made of.

The first line is the machine, its versions and its ceilings; each other line is a row that names the run it is from by
device, versions and commit, so that lines of several files can be searched together.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SCHEMA = 2
# timed, or a stated gap: unavailable (not here), skipped (not asked for), wrong (results differ), failed (it raised).
MODEL = "model"  # the function of a row of a whole model
Status = Literal["timed", "unavailable", "skipped", "wrong", "failed"]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `count` samples."""

    median: float
    lower: float
    upper: float
    count: int

    @property
    def precision(self) -> float:
        """How far off the median may be, as a share of it: the standard error of a median, 1.25 deviations / sqrt(n),
        where the distance between the quartiles is 1.35 deviations."""
        return 0.93 * (self.upper - self.lower) / math.sqrt(self.count) / self.median

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
    host of a GPU. first_seconds: the very first call, which may compile, and compilations: how many it did. peak_bytes:
    allocated at most during the call, beyond its inputs. kept_bytes: held for backward.
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
    first_seconds: float | None = None
    compilations: int | None = None


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
    """A call, or a whole model's, as its contenders were measured.

    minimal_bytes: the fewest that it must move; None of a model, which is bound by more than memory. series: of which
    curve over sizes it is a point.
    """

    minimal_bytes: int | None
    launch_bound: bool = False
    series: str = ""
    measurements: list[Measurement] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)

    @property
    def of_model(self) -> bool:
        """Whether it is a whole model's."""
        return self.function == MODEL

    def measurement(self, contender: str) -> Measurement | None:
        """The contender's, or None where it was not declared for this run."""
        return next((found for found in self.measurements if found.contender == contender), None)

    def ratio(self, contender: str, over: str) -> Ratio | None:
        """The ratio, or None where one of the two was not timed."""
        return next((found for found in self.ratios if (found.contender, found.over) == (contender, over)), None)

    def gigabytes_per_second(self, contender: str) -> float | None:
        """Minimal bytes over the median time."""
        found = self.measurement(contender)
        if self.minimal_bytes is None or found is None or found.seconds is None:
            return None
        return self.minimal_bytes / found.seconds.median / 1e9


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
    """All rows, and the machine, versions and ceilings they are from.

    counted: on a CPU, what the same workloads would take of a GPU. uncounted: why some or all of it is missing.
    """

    environment: dict[str, Any]
    rows: list[Row]
    counted: list[CountedRow] = field(default_factory=list)
    uncounted: str = ""

    @property
    def key(self) -> str:
        """Device, versions, commit and time, by which each line names its run."""
        found = (self.environment.get(name) for name in ("device_name", "torch", "triton", "commit", "time"))
        return " | ".join("-" if value is None else str(value)[:40] for value in found)

    @property
    def calls(self) -> list[Row]:
        """The rows of single calls at a size that somebody uses."""
        return [row for row in self.rows if not row.series and not row.of_model]

    @property
    def models(self) -> list[Row]:
        """The rows of whole models."""
        return [row for row in self.rows if row.of_model]

    @property
    def series(self) -> dict[str, list[Row]]:
        """The rows of each curve over sizes."""
        curves: dict[str, list[Row]] = {}
        for row in self.rows:
            if row.series:
                curves.setdefault(row.series, []).append(row)
        return curves

    def contenders(self) -> list[str]:
        """Names in the order of their first appearance."""
        return list(dict.fromkeys(found.contender for row in self.rows for found in row.measurements))

    def write(self, path: Path) -> None:
        """As lines of JSON; who reads meanwhile, or after it was cut off, finds all of it or what was there."""
        first = {"kind": "run", "run": self.key, "schema": SCHEMA, **self.environment, "uncounted": self.uncounted}
        lines = [first]
        for kind, rows in (("row", self.rows), ("counted", self.counted)):
            lines += [{"kind": kind, "run": self.key, **dataclasses.asdict(row)} for row in rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}")
        beside.write_text("".join(json.dumps(line) + "\n" for line in lines))
        beside.replace(path)

    @classmethod
    def read(cls, path: Path) -> Run:
        """The inverse of `write`; ValueError for what is no run, or one of another schema."""
        try:
            return cls._of_lines(path, *(json.loads(line) for line in path.read_text().splitlines()))
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} must hold the lines of a run, as benchmarks.run writes them ({error})") from None

    @classmethod
    def _of_lines(cls, path: Path, first: dict[str, Any], *lines: dict[str, Any]) -> Run:
        if first.get("schema") != SCHEMA:
            raise ValueError(
                f"{path} must have schema {SCHEMA}, but has {first.get('schema')}; run the benchmark again"
            )
        uncounted = first.pop("uncounted")
        environment = {name: value for name, value in first.items() if name not in ("kind", "run", "schema")}
        by_kind: dict[str, list[dict[str, Any]]] = {"row": [], "counted": []}
        for line in lines:
            of_run = line.pop("run")
            if of_run != first["run"]:
                raise ValueError(f"{path} must hold one run, {first['run']}, but has a line of {of_run}")
            by_kind[line.pop("kind")].append(line)
        return cls(environment, [*map(_row, by_kind["row"])], [*map(_counted_row, by_kind["counted"])], uncounted)


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
