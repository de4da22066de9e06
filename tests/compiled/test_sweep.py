"""The sweep of the launch tables reaches every kernel, and names what spills."""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.audit import sweep
from benchmarks.audit.inert import compiling_for
from benchmarks.audit.sweep_calls import FEW, ChannelCall, Kind, RowCall
from benchmarks.audit.sweep_record import SweepRecord
from benchmarks.audit.targets import TARGETS
from benchmarks.processes import workers
from fused_ops.kernels.launcher import Launcher
from fused_ops.kernels.row_norm.backward_kernels import row_norm_backward_kernel
from fused_ops.kernels.row_norm.forward_kernels import row_norm_forward_kernel
from tests.compiled.test_launcher_registers import bound_once
from tests.schedules import forget_schedules

KIND = Kind(torch.bfloat16, "gelu", "after")
MODULES = (
    "row_norm.forward_kernels",
    "row_norm.backward_kernels",
    "channel_norm.forward_kernels",
    "channel_norm.backward_kernels",
    "channel_norm.batch_kernels",
    "channel_norm.switch_kernels",
    "column_sum",
)
ONE_PROGRAM_OF_ONE_WARP = "mixing_gradients_kernel"  # of a switchable norm whose x learns nothing; of no table


@pytest.fixture(autouse=True)
def unwritten_memory_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of gigabytes that nothing reads or writes."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


@contextlib.contextmanager
def few_registers() -> Iterator[None]:
    """Gives the threads of every kernel that is scheduled inside so few that it spills, and never more."""
    original = Launcher.__init__

    def with_few(self: Launcher, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **{**options, "most_registers": 24})

    no_more = mock.patch.object(Launcher, "_bound_registers", bound_once)
    forget_schedules()
    with mock.patch.object(Launcher, "__init__", with_few), no_more:
        yield
    forget_schedules()


# Which is no norm, and is compiled by test_residual_add_launches.
OF_THE_RESIDUAL_ADD = "column_sum_of_any_span_kernel"


def test_it_reaches_every_kernel() -> None:
    modules = [importlib.import_module(f"fused_ops.kernels.{name}") for name in MODULES]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    reached: set[str] = set()
    groups = sweep.groups("sm_90", [KIND])
    with compiling_for(TARGETS["sm_90"]):
        for group in groups:
            assert {entry.kernel for entry in group.entries} == {group.kernel}
            made = {entry for call in group.calls for entry in sweep.entries_of(call)}
            assert group.entries <= made
            reached.add(group.kernel)
            assert len(set(map(str, group.calls))) == len(group.calls)
    assert reached == kernels - {ONE_PROGRAM_OF_ONE_WARP, OF_THE_RESIDUAL_ADD}
    assert len(groups) == len(reached)


def test_kernels_without_an_activation_are_compiled_for_the_first_alone() -> None:
    kinds = [KIND, Kind(torch.bfloat16, "silu", "after")]
    both, alone = sweep.groups("sm_90", kinds), sweep.groups("sm_90", kinds[1:])
    of_both, of_one = (Counter(group.kernel for group in groups) for groups in (both, alone))
    assert sum(len(group.entries) for group in both) == len(frozenset().union(*(group.entries for group in both)))
    for kernel in ("row_moments_kernel", "combine_moments_kernel", "column_sum_kernel"):
        assert of_both[kernel] == of_one[kernel] == 1
    assert of_both["row_norm_forward_kernel"] == 2


def test_another_process_knows_the_entries_of_a_group() -> None:
    """A group is made in one process and compiled in others, where kernels are met in another order."""
    with workers(interpret=False, count=1) as pool:
        groups = pool.submit(sweep.groups, "sm_90", [KIND], every=60).result()
    with workers(interpret=False, count=1) as pool:
        for group in reversed(groups):
            assert pool.submit(group.compile).result() == []


def test_an_entry_that_no_call_gets_is_no_entry_that_was_compiled() -> None:
    group = sweep.groups("sm_90", [KIND], every=60)[0]
    strange = next(iter(group.entries))._replace(source="of another kernel")
    with pytest.raises(RuntimeError, match="1 of 1 entries must be among those of the calls"):
        sweep.spills(group.calls, "sm_90", frozenset({strange}))


def test_of_a_group_only_its_entries_are_compiled() -> None:
    group = next(group for group in sweep.groups("sm_90", [KIND]) if group.kernel == "row_gradient_sums_kernel")
    with mock.patch.object(Launcher, "_first_launch") as compile_one:
        group.compile()
    assert compile_one.call_count == len(group.entries) > 0


@pytest.mark.parametrize(
    "call",
    [RowCall(KIND, "same type", 1024, True, FEW), ChannelCall(KIND, "same type", (8, 32, (28, 28)), False)],
    ids=["rows", "channels"],
)
def test_it_names_what_spills(call: RowCall | ChannelCall) -> None:
    assert sweep.spills([call], "sm_90") == []
    with few_registers():
        found = sweep.spills([call], "sm_90")
    assert found and all(f"sm_90: {spill.kernel} spills {spill.bytes} bytes" in str(spill) for spill in found)
    assert str(call) in str(found[0])


def test_what_was_swept_is_known_until_its_kernels_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "swept.jsonl"
    group = of_the_rows_forward()
    assert SweepRecord(path).spills(group) is None
    found = [sweep.Spill("a call", "sm_90", "a_kernel", 255, 8)]
    path.write_text('{"target": "sm_90", "tri')  # cut off
    SweepRecord(path).add(group, found)
    assert SweepRecord(path).spills(of_the_rows_forward()) == found
    with few_registers():
        assert SweepRecord(path).spills(of_the_rows_forward()) is None
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "more_registers", lambda num_warps, registers: 255)
        assert SweepRecord(path).spills(of_the_rows_forward()) is None
    with monkeypatch.context() as patch:
        patch.setattr(row_norm_backward_kernel, "_src", "another kernel")
        sweep.source_of.cache_clear()
        assert SweepRecord(path).spills(of_the_rows_forward()) == found
    monkeypatch.setattr(row_norm_forward_kernel, "_src", "another kernel")
    sweep.source_of.cache_clear()
    assert SweepRecord(path).spills(of_the_rows_forward()) is None
    sweep.source_of.cache_clear()


def of_the_rows_forward() -> sweep.Group:
    """Some entries of one kernel."""
    groups = sweep.groups("sm_90", [KIND], every=50)
    (group,) = (group for group in groups if group.kernel == "row_norm_forward_kernel")
    return group
