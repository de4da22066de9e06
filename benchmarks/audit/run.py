"""Audits every named workload without a GPU: compiled for one that is not there, and interpreted under a counter.

Prints a table with a line for each call, writes JSON, and ends with 1 where a call exceeds an allowance of the design
or a kernel spills. --full takes the workloads that the default run leaves out as well, counts the traffic on every
device, and compiles every entry of the launch tables, which takes hours.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import environment
from ..processes import workers
from ..traffic import Direction
from ..workloads import WORKLOADS, Workload
from . import jobs, sweep
from .findings import Finding
from .host import HostTime
from .report import Audit, summary
from .rows import AuditRow, assemble
from .slices import Counted
from .sweep_record import SweepRecord
from .targets import DEVICE_OF, DEVICES, TARGETS, Device

DTYPES = ("bfloat16", "float32")
CORES = os.cpu_count() or 2
GROUPS_A_POOL = 64  # of the sweep

Pair = tuple[str, str]  # type, target
Key = tuple[str, str, str]  # workload, type, target


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", description=__doc__)
    parser.add_argument("--device", choices=tuple(DEVICES), default="H200", help="the one that the table is of")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="the type that the table is of")
    parser.add_argument("--only", action="store_true", help="compile for that device and type alone")
    parser.add_argument(
        "--filter", nargs="*", default=[], metavar="TEXT", help="only workloads whose name holds a text, and all these"
    )
    parser.add_argument(
        "--full", action="store_true", help="every workload and entry of the launch tables, traffic on every device"
    )
    parser.add_argument("--every", type=_positive, default=1, metavar="N", help="with --full, every N-th entry alone")
    parser.add_argument(
        "--swept",
        type=Path,
        metavar="FILE",
        help="with --full, the entries swept so far: what it has is not compiled again",
    )
    parser.add_argument("--output", type=Path, default=environment.LOCAL_RESULTS, help="folder of the JSON")
    options = parser.parse_args(arguments)
    if options.swept is not None and not options.full:
        parser.error("--swept is of the sweep that --full makes; give both")
    return options


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, but is {number}")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """Audits; 1 where an allowance is exceeded, or where nothing was chosen."""
    options = parse(arguments)
    chosen = [
        workload
        for name, workload in WORKLOADS.items()
        if any(text in name for text in options.filter)
        or (not options.filter and (options.full or workload.in_default_run))
    ]
    if not chosen:
        print(f"no workload's name holds any of {options.filter}; known are {', '.join(WORKLOADS)}")
        return 1
    described = environment.describe(torch.device("cpu"))
    audit = perform(chosen, options, described)
    path = options.output / f"audit-{environment.stamp(described)}.json"
    audit.write(path)
    print(f"\n{summary(audit)}\nFull data: {path}")
    return 0 if audit.passed else 1


def perform(chosen: Sequence[Workload], options: argparse.Namespace, described: dict[str, Any]) -> Audit:
    """Everything the options ask for."""
    device = DEVICES[options.device]
    devices = {**DEVICE_OF, device.target: device}
    shown = (options.dtype, device.target)
    pairs = [shown] if options.only else [(dtype, target) for dtype in DTYPES for target in TARGETS]
    work = _work([workload.name for workload in chosen], pairs, pairs if options.full else [shown])
    found = [finding for each in work.compiled.values() for finding in each.findings]
    rows: list[AuditRow] = []
    for key in work.counted:
        for row, findings in _rows(key, work, devices[key[2]]):
            found += findings
            if key[1:] == shown:
                rows.append(row)
    targets = sorted({target for _, target in pairs})
    spills, swept = _sweep(targets, options.every, SweepRecord(options.swept)) if options.full else ([], 0)
    return Audit(described, rows, list(dict.fromkeys(found)), spills, swept)


@dataclass(frozen=True)
class _Work:
    """What worker processes found."""

    compiled: dict[Key, jobs.Compiled]
    counted: dict[Key, dict[Direction, Counted]]
    host: dict[str, dict[Direction, HostTime]]


def _work(names: Sequence[str], compiled_pairs: Sequence[Pair], counted_pairs: Sequence[Pair]) -> _Work:
    with ExitStack() as stack:
        interpreting = stack.enter_context(workers(interpret=True, count=CORES))
        compiling = stack.enter_context(workers(interpret=False, count=CORES))
        total = len(names) * (len(counted_pairs) + len(compiled_pairs) + 1)
        bar = stack.enter_context(tqdm(total=total, unit="job"))
        counted = _submit(interpreting, jobs.count_workload, names, counted_pairs)
        compiled = _submit(compiling, jobs.compile_workload, names, compiled_pairs)
        for done in as_completed([*counted.values(), *compiled.values()]):
            done.result()  # raises here what was raised there
            bar.update()
        # Alone: what else runs would be timed with it.
        host = {}
        for name in names:
            host[name] = compiling.submit(jobs.time_on_host, name).result()
            bar.update()
    return _Work(
        {key: future.result() for key, future in compiled.items()},
        {key: future.result() for key, future in counted.items()},
        host,
    )


def _sweep(targets: Sequence[str], every: int, record: SweepRecord) -> tuple[list[sweep.Spill], int]:
    """What spills in the launch tables, and how many entries were compiled, now or as the record has it."""
    with workers(interpret=False, count=1) as pool:
        groups = [group for name in targets for group in pool.submit(sweep.groups, name, every=every).result()]
    left = [group for group in groups if record.spills(group) is None]
    entries, entries_left = (sum(len(group.entries) for group in some) for some in (groups, left))
    with tqdm(total=entries, initial=entries - entries_left, unit="entry") as bar:
        for first in range(0, len(left), GROUPS_A_POOL):  # a worker keeps what it compiled: gigabytes of all
            with workers(interpret=False, count=CORES) as pool:
                compiling = {pool.submit(group.compile): group for group in left[first : first + GROUPS_A_POOL]}
                for future in as_completed(compiling):
                    group = compiling[future]
                    record.add(group, future.result())
                    bar.update(len(group.entries))
    return list(dict.fromkeys(spill for group in groups for spill in record.spills(group) or ())), entries


def _submit(pool: Executor, job: Callable[..., Any], names: Sequence[str], pairs: Sequence[Pair]) -> dict[Key, Future]:
    return {(name, *pair): pool.submit(job, name, *pair) for pair in pairs for name in names}


def _rows(key: Key, work: _Work, device: Device) -> Iterator[tuple[AuditRow, list[Finding]]]:
    name, dtype_name, _ = key
    compiled = work.compiled[key]
    for direction, counted in work.counted[key].items():
        yield assemble(
            WORKLOADS[name],
            getattr(torch, dtype_name),
            compiled.launches[direction],
            max(compiled.compilations.values()),
            counted,
            device,
            work.host[name][direction],
        )
