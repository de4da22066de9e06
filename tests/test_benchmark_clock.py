"""The benchmark's clock: contenders take turns, and each kind of call is timed the way that suits it."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch

from benchmarks import timing
from benchmarks.measure import Settings, _time_on_gpu, ratios
from benchmarks.peers import EAGER, OURS
from benchmarks.records import Measurement, Ratio, Spread


def test_contenders_take_turns_in_changing_order() -> None:
    taken: list[str] = []

    def turn(name: str, seconds: float) -> timing.Turn:
        def take() -> float:
            taken.append(name)
            return seconds

        return take

    samples = timing.interleave({"a": turn("a", 1.0), "b": turn("b", 2.0), "c": turn("c", 3.0)}, budget_s=0.0)
    rounds = [tuple(taken[start : start + 3]) for start in range(0, len(taken), 3)]
    assert len(rounds) == timing.MIN_ROUNDS
    assert all(set(order) == {"a", "b", "c"} for order in rounds)
    assert len(set(rounds)) > 1
    assert samples == {name: [seconds] * len(rounds) for name, seconds in {"a": 1.0, "b": 2.0, "c": 3.0}.items()}


def test_only_an_uncertain_row_is_given_more_than_its_budget() -> None:
    noise = iter([1.0, 9.0] * 10**6)
    quiet = timing.interleave({"a": lambda: 1.0}, budget_s=0.0, patience=1e6)
    assert len(quiet["a"]) == timing.MIN_ROUNDS
    disturbed = timing.interleave({"a": lambda: next(noise)}, budget_s=0.001, patience=20.0)
    assert len(disturbed["a"]) > timing.MAX_ROUNDS


def test_a_turn_on_a_cpu_first_calls_untimed() -> None:
    calls = Counter[str]()
    turn = timing.cpu_turn(lambda: calls.update(["call"]) or sum(range(10**5)))
    before = calls["call"]
    assert 0 < turn() < 1
    assert calls["call"] - before >= 2


def test_spread_and_ratios() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 5.0, 4.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)
    (ratio,) = ratios({OURS: [1.0, 2.0, 3.0], EAGER: [2.0, 8.0, 4.0], "alone": [1.0]}, paired=True)
    assert ratio == Ratio(OURS, EAGER, 0.5, Spread(0.5, 0.375, 0.625, 3))
    (ratio,) = ratios({OURS: [1.0, 2.0, 3.0], EAGER: [2.0, 8.0, 4.0]}, paired=False)
    assert ratio.rounds is None


# --- a GPU's, with its parts replaced ------------------------------------------------------------------------------


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Events take a microsecond for `quick` calls and ten milliseconds for others; graphs refuse `stubborn` ones."""
    used: list[str] = []

    def event_turn(run: timing.Run, flush: object) -> timing.Turn:
        used.append("events")
        return lambda: 1e-6 if run() == "quick" else 1e-2

    def graph_turn(run: timing.Run, flush: object) -> timing.Turn:
        if run() == "stubborn":
            raise RuntimeError("operation not permitted when stream is capturing")
        used.append("graph")
        return lambda: 1e-6

    monkeypatch.setattr(timing, "CacheFlush", lambda device: None)
    monkeypatch.setattr(timing, "event_turn", event_turn)
    monkeypatch.setattr(timing, "graph_turn", graph_turn)
    monkeypatch.setattr(timing, "host_seconds", lambda run: [1e-5])
    return used


def timed_on_gpu(launch_bound: bool, *kinds: str) -> dict[str, Measurement]:
    runs: dict[str, timing.Run] = {kind: functools.partial(str, kind) for kind in kinds}
    found = {kind: Measurement(kind, "timed", peak_bytes=7) for kind in kinds}
    _time_on_gpu(runs, runs, found, Settings(torch.device("cuda"), "full", seconds=0.0), launch_bound)
    return found


def test_a_row_with_a_small_call_is_replayed_from_graphs(fake_gpu: list[str]) -> None:
    found = timed_on_gpu(False, "quick", "slow")
    assert {measurement.method for measurement in found.values()} == {"graph replay, cache flushed"}
    assert found["quick"].seconds == Spread(1e-6, 1e-6, 1e-6, timing.MIN_ROUNDS)
    assert found["quick"].host_seconds == Spread(1e-5, 1e-5, 1e-5, 1) and found["quick"].peak_bytes == 7
    assert fake_gpu[-2:] == ["graph", "graph"]


def test_a_row_of_large_calls_is_timed_by_events(fake_gpu: list[str]) -> None:
    found = timed_on_gpu(False, "slow", "slower")
    assert {measurement.method for measurement in found.values()} == {"events, cache flushed"}
    assert "graph" not in fake_gpu


def test_a_launch_bound_row_is_replayed_whatever_its_events_say(fake_gpu: list[str]) -> None:
    assert timed_on_gpu(True, "slow")["slow"].method == "graph replay, cache flushed"
    assert fake_gpu == ["graph"]


def test_what_cannot_be_captured_is_a_stated_gap(fake_gpu: list[str]) -> None:
    found = timed_on_gpu(True, "quick", "stubborn")
    assert found["quick"].status == "timed"
    assert found["stubborn"].status == "failed" and "no CUDA graph" in found["stubborn"].reason
    assert found["stubborn"].seconds is None
