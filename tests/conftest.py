"""Chooses, before fused_ops is imported, how kernels run: compiled where there is a GPU, elsewhere interpreted."""

from __future__ import annotations

import collections
import heapq
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read as fused_ops.kernels defines its kernels; TRITON_INTERPRET=0 compiles them, as tests/compiled wants it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fused_ops  # noqa: E402

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is marked as full
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test that is marked one_in(n) marks all but every n-th as full, and of many leaves two."""
    cases: dict[tuple[str, str], list[pytest.Function]] = collections.defaultdict(list)
    for item in items:
        if (
            isinstance(item, pytest.Function)
            and item.get_closest_marker("one_in")
            and not item.get_closest_marker("full")
        ):
            cases[str(item.path), item.name.partition("[")[0]].append(item)
    for of_test in cases.values():
        (every,) = of_test[0].get_closest_marker("one_in").args  # type: ignore[union-attr]
        chosen = max(min(2, every - 1), -(-len(of_test) // every))
        for item in as_different_as_can_be(of_test)[chosen:] if len(of_test) > chosen else ():
            item.add_marker(pytest.mark.full)


def as_different_as_can_be(items: list[pytest.Function]) -> list[pytest.Function]:
    """First those with the most values of parameters that none before has, then the others in an order that is as good
    as drawn; the same in every run."""
    drawn = sorted(items, key=lambda item: zlib.crc32(item.name.encode()))
    values = [{(name, known_by(value)) for name, value in item.callspec.params.items()} for item in drawn]
    heap = [(-len(of_item), place) for place, of_item in enumerate(values)]
    heapq.heapify(heap)
    first, seen = [], set[tuple[str, Any]]()
    while heap:
        promised, place = heapq.heappop(heap)
        new = values[place] - seen
        if new and -len(new) == promised:
            first.append(place)
            seen |= new
        elif new:  # it was more before others were chosen
            heapq.heappush(heap, (-len(new), place))
    chosen = set(first)
    return [drawn[place] for place in first] + [item for place, item in enumerate(drawn) if place not in chosen]


def known_by(value: Any) -> Any:
    """What is the same for the same value of a parameter."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value


@pytest.fixture(scope="session", autouse=True)
def interpreter_is_quick() -> Iterator[None]:
    """Saves a fifth of the time that interpreted kernels take."""
    if HAS_GPU or not fused_ops.backend.interpreted():
        yield
        return
    from benchmarks.audit.quick_interpreter import quick_interpreter

    with quick_interpreter():
        yield


@pytest.fixture
def device() -> torch.device:
    """Where kernels run here."""
    return DEVICE


@pytest.fixture(params=["triton", "torch"])
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once with the kernels and once with the torch composition."""
    with fused_ops.use_backend(request.param):
        yield request.param


@pytest.fixture
def triton_backend() -> Iterator[None]:
    """Runs a test with the kernels."""
    with fused_ops.use_backend("triton"):
        yield


@pytest.fixture
def torch_backend() -> Iterator[None]:
    """Runs a test with the torch composition."""
    with fused_ops.use_backend("torch"):
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the name of a kernel with every launch."""
    launcher = pytest.importorskip("fused_ops.kernels.launcher", reason="Triton is not installed")
    names: list[str] = []
    original = launcher.Launcher.__call__

    def noted(self: Any, *arguments: Any) -> None:
        names.append(self.kernel.__name__)
        original(self, *arguments)

    monkeypatch.setattr(launcher.Launcher, "__call__", noted)
    return names


@pytest.fixture
def way(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Runs channel norms in the way that it is parametrized with, and makes cases for it."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from tests.channel_norm_ways import running

    with running(request.param) as way:
        yield way


@pytest.fixture
def schedule(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Other schedules for the row norms, until the test ends."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from tests.row_norm_schedule import Schedule
    from tests.schedules import forget_schedules

    yield Schedule(monkeypatch)
    monkeypatch.undo()
    forget_schedules()


class FamilyCall(NamedTuple):
    """What autograd asked the launchers of a family for, eagerly, and what they returned."""

    direction: str
    args: tuple
    kwargs: dict[str, Any]
    result: Any


@pytest.fixture
def family_calls(monkeypatch: pytest.MonkeyPatch) -> list[FamilyCall]:
    """Grows with every forward and backward of a norm that autograd runs by kernels."""
    planned = pytest.importorskip("fused_ops.planned", reason="Triton is not installed")
    calls: list[FamilyCall] = []
    original = planned.family_of

    def noted(norm: Any) -> Any:
        family = original(norm)

        def plan_forward(*planned_for: Any) -> Callable[..., Any]:
            norm, statistics, bits = planned_for[4:7]
            run = family.plan_forward(*planned_for)

            def forward(*args: Any) -> Any:
                result = run(*args)
                kwargs = {"save_statistics": statistics, "save_bits": bits}
                calls.append(FamilyCall("forward", (*args[1:5], norm, *args[5:]), kwargs, result))
                return result

            return forward

        def plan_backward(*planned_for: Any) -> Callable[..., Any]:
            *_, norm, wanted = planned_for
            run = family.plan_backward(*planned_for)

            def backward(*args: Any) -> Any:
                result = run(*args)
                calls.append(FamilyCall("backward", (*args[1:], norm, wanted), {}, result))
                return result

            return backward

        return family._replace(plan_forward=plan_forward, plan_backward=plan_backward)

    monkeypatch.setattr(planned, "family_of", noted)
    return calls


@pytest.fixture
def memory_checked() -> Iterator[None]:
    """Runs a test under the memory checker, which fails it where a kernel reaches beyond its tensors or two of its
    programs meet. Only interpreted kernels can be watched: on a GPU the test runs without."""
    if HAS_GPU or not fused_ops.backend.interpreted():
        yield
        return
    from benchmarks.audit.memory_checker import checked

    with checked():
        yield


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """Fills what torch.empty returns with NaN, so that an element no kernel writes cannot pass by luck."""
    fused_ops.known.forget()  # decided under what another test has replaced
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
