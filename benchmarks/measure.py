"""One workload, all contenders: build, check, count memory, and only then time."""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from . import compilations, correctness, memory, timing
from .peers import COMPARED, PEERS, Peer, forget_compiled
from .records import Measurement, Ratio, Row, Spread, Status
from .traffic import DIRECTIONS, Direction, minimal_bytes
from .workloads import Call, Case, Size, Workload

MOST_CASES = timing.CALLS_A_GRAPH  # of one call, whose tensors it takes in turn


@dataclass(frozen=True)
class Settings:
    """seconds: how long the contenders of one row are timed, together. compile_all: also where a CPU takes long to.
    patient_until: on the clock of time.perf_counter, when a disturbed row is no longer given more than its seconds."""

    device: torch.device
    size: Size
    seconds: float = 1.0
    compile_all: bool = False
    patient_until: float = 0.0
    peers: Sequence[Peer] = PEERS

    @property
    def patience(self) -> float:
        """How many times its seconds a disturbed row gets."""
        return timing.PATIENCE if time.perf_counter() < self.patient_until else 1.0


@dataclass(frozen=True)
class Contender:
    """A peer's call of this workload, or why there is none."""

    name: str
    call: Call | None
    status: Status = "timed"
    reason: str = ""


def measure(workload: Workload, dtype: torch.dtype, settings: Settings) -> Iterator[Row]:
    """A row for each direction."""
    forget_compiled()
    shape = workload.shape(settings.size)
    contenders = [_contender(peer, workload, settings) for peer in settings.peers]
    problem = ""
    try:
        case = workload.case(settings.size, dtype, settings.device)
        expected = correctness.expect(workload, case)
    except RuntimeError as error:
        if not memory.is_exhausted(error):
            raise
        problem = first_line(error)
    for direction in DIRECTIONS:
        row = Row(
            workload.name,
            workload.function,
            shape,
            str(dtype).removeprefix("torch."),
            direction,
            minimal_bytes(workload, shape, dtype, direction),
            workload.launch_bound,
            workload.series,
        )
        if problem:
            row.measurements.extend(Measurement(contender.name, "failed", problem) for contender in contenders)
        else:
            with torch.no_grad() if direction == "forward" else contextlib.nullcontext():
                _fill(row, workload, case, expected, contenders, direction, settings)
        yield row


def _contender(peer: Peer, workload: Workload, settings: Settings) -> Contender:
    gap = peer.gap(workload, settings.device.type)
    if gap:
        return Contender(peer.name, None, "unavailable", gap)
    if peer.only_full and not settings.compile_all:
        return Contender(peer.name, None, "skipped", "only with --full")
    compiled_by_default = settings.device.type != "cpu" or workload.compiled_on_cpu
    if peer.compiles and not (compiled_by_default or settings.compile_all):
        return Contender(peer.name, None, "skipped", "compiling takes long on a CPU: this row only with --full")
    try:
        return Contender(peer.name, peer.build(workload))
    except Exception as error:
        return Contender(peer.name, None, "failed", first_line(error))


def _fill(
    row: Row,
    workload: Workload,
    case: Case,
    expected: correctness.Expected,
    contenders: Sequence[Contender],
    direction: Direction,
    settings: Settings,
) -> None:
    found: dict[str, Measurement] = {}
    runs: dict[str, timing.Run] = {}
    captured: dict[str, timing.Run] = {}
    cases = rotation(case, settings.device)
    for contender in contenders:
        if contender.call is None:
            found[contender.name] = Measurement(contender.name, contender.status, contender.reason)
            continue
        try:
            found[contender.name] = _admit(contender, workload, case, expected, direction, settings.device)
        except Exception as error:  # a peer may fail in any way, and the others are measured all the same
            found[contender.name] = Measurement(contender.name, "failed", first_line(error))
        if found[contender.name].status == "timed":
            run = correctness.run_forward if direction == "forward" else correctness.run_forward_backward
            runs[contender.name] = rotating(functools.partial(run, contender.call), cases)
            captured[contender.name] = rotating(functools.partial(_on_new_leaves, run, contender.call), cases)
    finish(row, found, runs, captured, settings)


def finish(
    row: Row,
    found: dict[str, Measurement],
    runs: dict[str, timing.Run],
    captured: dict[str, timing.Run],
    settings: Settings,
) -> None:
    """Times those that may be timed, and gives the row all that is known of them.

    captured: each run as a CUDA graph may hold it; without any, they are timed by events.
    """
    samples: dict[str, list[float]] = {}
    if runs:
        if settings.device.type == "cpu":
            samples = _time_on_cpu(runs, found, settings)
        else:
            samples = _time_on_gpu(runs, captured, found, settings, row.launch_bound)
    row.measurements.extend(found.values())
    row.ratios.extend(ratios(samples, paired=settings.device.type == "cpu"))


def rotation(case: Case, device: torch.device) -> list[Case]:
    """Cases of the same values, so many that a call finds nothing of what the one before it left in a GPU's cache."""
    if device.type == "cpu":
        return [case]
    wanted = 2 * timing.cache_bytes(device) // max(1, case.bytes)
    return [case, *(case.copy() for _ in range(min(wanted, MOST_CASES - 1)))]


def rotating(run: Callable[[Case], object], cases: Sequence[Case]) -> timing.Run:
    """Runs on one case after the other."""
    following = itertools.cycle(cases)
    return lambda: run(next(following))


def _admit(
    contender: Contender,
    workload: Workload,
    case: Case,
    expected: correctness.Expected,
    direction: Direction,
    device: torch.device,
) -> Measurement:
    """What is known before the clock starts; status timed where the contender may be timed."""
    call = contender.call
    assert call is not None
    backward = direction != "forward"
    run = functools.partial(correctness.run_forward_backward if backward else correctness.run_forward, call, case)
    first_seconds, compiled = compilations.first_call(run, device)
    verdict = correctness.check(workload, case, call, expected, direction)
    if verdict.reason:
        return Measurement(contender.name, "wrong", verdict.reason, error=verdict.error)
    return Measurement(
        contender.name,
        "timed",
        error=verdict.error,
        peak_bytes=memory.peak_bytes(run, device),
        kept_bytes=memory.kept_bytes(call, case) if backward else None,
        first_seconds=first_seconds,
        compilations=compiled,
    )


def _time_on_cpu(
    runs: dict[str, timing.Run], found: dict[str, Measurement], settings: Settings
) -> dict[str, list[float]]:
    turns = {name: timing.cpu_turn(run) for name, run in runs.items()}
    samples = timing.interleave(turns, settings.seconds, settings.patience)
    for name, taken in samples.items():
        found[name] = replace(found[name], seconds=Spread.of(taken), method="cpu clock")
    return samples


def _on_new_leaves(run: Callable[[Call, Case], object], call: Call, case: Case) -> object:
    return run(call, case.on_new_leaves())


def _time_on_gpu(
    runs: dict[str, timing.Run],
    captured: dict[str, timing.Run],
    found: dict[str, Measurement],
    settings: Settings,
    launch_bound: bool,
) -> dict[str, list[float]]:
    flush = timing.CacheFlush(settings.device)
    small = bool(captured) and (launch_bound or timing.is_small(runs, flush))
    turns: dict[str, timing.Turn] = {}
    for name, run in runs.items():
        try:
            turns[name] = timing.graph_turn(captured[name], flush) if small else timing.event_turn(run, flush)
        except RuntimeError as error:  # what a capture raises
            found[name] = Measurement(name, "failed", f"no CUDA graph of it: {first_line(error)}")
    samples = timing.interleave(turns, settings.seconds, settings.patience)
    for name, taken in samples.items():
        method = "graph replay, cache flushed" if small else "events, cache flushed"
        host = Spread.of(timing.host_seconds(runs[name]))
        found[name] = replace(found[name], seconds=Spread.of(taken), host_seconds=host, method=method)
    return samples


def ratios(samples: dict[str, list[float]], paired: bool) -> Iterator[Ratio]:
    """Of each pair that is compared; paired: the n-th samples of both are from one round."""
    for contender, over in COMPARED:
        if contender in samples and over in samples:
            ours, theirs = samples[contender], samples[over]
            rounds = [a / b for a, b in zip(ours, theirs, strict=True)] if paired else None
            of_medians = Spread.of(ours).median / Spread.of(theirs).median
            yield Ratio(contender, over, of_medians, None if rounds is None else Spread.of(rounds))


def first_line(error: BaseException) -> str:
    """What was raised, with the first line of its message."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
