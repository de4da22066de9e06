"""The clock. One sample of each contender in turn, in another order every round, so that noise hits all alike.

CPU: a turn is one call that is not timed, which brings caches and allocator into the state that this contender leaves
behind, then as many as fill the clock's resolution.

GPU: a turn overwrites the second-level cache, then times the call between two events. Calls so short that the host
cannot issue them in time are captured in a CUDA graph, each behind its overwriting of the cache, and replayed; a graph
of the overwriting alone, replayed beside it, is subtracted.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping

import torch

from .records import Spread

Turn = Callable[[], float]  # takes one sample, in seconds
Run = Callable[[], object]

# A timed stretch on a CPU: a thousand times what reading the clock costs.
CPU_STRETCH_S = 2e-4
# Below it Python would show in an event's time: with autograd some hundred us a call, which are a column of their own.
GRAPH_BELOW_S = 2e-3
CALLS_A_GRAPH = 20
MIN_ROUNDS, MAX_ROUNDS = 7, 200
# A row whose medians are known to within it is done; one that something disturbs gets up to PATIENCE times its budget.
WANTED_PRECISION = 0.015
PATIENCE = 3.0


def interleave(turns: Mapping[str, Turn], budget_s: float, patience: float = 1.0) -> dict[str, list[float]]:
    """Samples by contender: rounds of one turn each, shuffled, until the budget is spent.

    patience: how many budgets are spent where the medians are still uncertain after the first.
    """
    order = list(turns)
    shuffle = random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in turns}

    def is_done(rounds: int, spent: float) -> bool:
        if rounds < MIN_ROUNDS or (spent < budget_s and rounds < MAX_ROUNDS):
            return False
        return spent >= patience * budget_s or all(
            Spread.of(taken).precision < WANTED_PRECISION for taken in samples.values()
        )

    rounds = 0
    with _without_collection():
        started = time.perf_counter()
        while turns and not is_done(rounds, time.perf_counter() - started):
            shuffle(order)
            for name in order:
                samples[name].append(turns[name]())
            rounds += 1
    return samples


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Python's garbage collector waits until the clock has stopped."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def set_aside_what_lives() -> None:
    """Has collections of garbage, one before each capture and each row, look only through what comes after: of modules
    like torch's compiler there is half a second to look through."""
    gc.collect()
    gc.freeze()


def keep_freed_memory() -> str:
    """Lets the C library keep memory that is freed, as a GPU's allocator does and as a training process is advised to.

    By default glibc gives large blocks back to the system at once, and the next call pays for every page again: several
    times the cost of a norm, differing from call to call by a factor of ten. Returns what was done, for the record.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return "the system's default"
    kept = mallopt(m_mmap_max, 0) == 1 and mallopt(m_trim_threshold, -1) == 1
    return "glibc, freed memory kept" if kept else "the system's default"


def cpu_turn(run: Run) -> Turn:
    """Times calls on a CPU."""
    started = time.perf_counter()
    run()
    calls = max(1, math.ceil(CPU_STRETCH_S / max(time.perf_counter() - started, 1e-9)))

    def turn() -> float:
        run()
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - started) / calls

    return turn


def cache_bytes(device: torch.device) -> int:
    """Of a GPU's second-level cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


class CacheFlush:
    """Overwrites a GPU's second-level cache, with a buffer so large that the host issues the next call meanwhile."""

    def __init__(self, device: torch.device) -> None:
        size = max(256 * 2**20, 4 * cache_bytes(device))
        self.buffer = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self) -> None:
        self.buffer.zero_()

    @functools.cached_property
    def graph(self) -> torch.cuda.CUDAGraph:
        """As many as a graph of calls has."""
        return _capture(self)


def _event_seconds(run: Run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def event_turn(run: Run, flush: CacheFlush) -> Turn:
    """Times one call on a GPU between events, its inputs not in the cache."""

    def turn() -> float:
        flush()
        return _event_seconds(run)

    return turn


def graph_turn(run: Run, flush: CacheFlush) -> Turn:
    """Times replays of a graph of calls on a GPU, their inputs not in the cache and no host between them."""

    def flush_and_run() -> None:
        flush()
        run()

    calls, flushes = _capture(flush_and_run), flush.graph

    def turn() -> float:
        return (_event_seconds(calls.replay) - _event_seconds(flushes.replay)) / CALLS_A_GRAPH

    return turn


def _capture(run: Run) -> torch.cuda.CUDAGraph:
    # What is allocated or loaded at a first call may not happen within a capture.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # A collection may free what an earlier row left, a graph or an event, which ends a capture with an error.
    with _without_collection(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS_A_GRAPH):
            run()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def is_small(runs: Mapping[str, Run], flush: CacheFlush) -> bool:
    """Whether any of the contenders is so fast that all must be timed by graph; a row has one method."""

    def quickest(run: Run) -> float:
        turn = event_turn(run, flush)
        return min(turn() for _ in range(5))

    return min(quickest(run) for run in runs.values()) < GRAPH_BELOW_S


def host_seconds(run: Run, calls: int = 50) -> list[float]:
    """What each call takes on the host, the device's queue never full."""
    samples = []
    for index in range(calls):
        if index % 10 == 0:
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        samples.append(time.perf_counter() - started)
    torch.cuda.synchronize()
    return samples
