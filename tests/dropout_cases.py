"""Cases of dropout inside the add_ norms, and the ways in which their kernels run; what is dropped is told by
`norm_cases.Case.keep`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import fused_ops
from fused_ops import functional as F
from tests import batch_norm_cases, channel_norm_ways, every_norm, row_norm_cases
from tests.norm_cases import DEVICE, Case, with_fields
from tests.row_norm_schedule import Schedule
from tests.schedules import forget_schedules

Tensor = torch.Tensor

ROWS = ("add_layer_norm", "add_rms_norm")
PLANES = ("add_group_norm", "add_instance_norm")
# Switchable norm's cases are functions of their tensors (`switch_norm_calls`).
FUNCTIONS = (*ROWS, *PLANES, "add_batch_norm")

# x, and the chunks of rows forward and backward, if any: blocks so small that a test's few elements are many of them. A
# draw of four is of one row where 4 divides the span. Rows are walked where a span fills 16 bytes alone, and walked
# back where no parameter learns.
ROW_WAYS: dict[str, tuple[tuple[int, int], tuple[str, int, int] | None]] = {
    "whole rows": ((40, 36), None),
    "whole odd rows": ((40, 33), None),
    "whole short rows": ((90, 3), None),
    "walked rows": ((4, 200), ("walk", 64, 1)),
    "rows walked back": ((4, 200), ("walk", 64, 1)),
    "shared rows": ((4, 196), ("share", 32, 2)),
    "shared odd rows": ((4, 197), ("share", 64, 1)),
}


def small_case(function: str, **fields: Any) -> Case:
    """A case of x [3, 5] or [3, 4, 3], of which something is dropped and something is not."""
    fields = {"dropout_p": 0.4, "drop_seed": 3, **fields}
    if function == "add_batch_norm":
        return batch_norm_cases.make_case(function, 3, 4, 3, **fields)
    return every_norm.small_case(function, samples=3, **fields)


@contextlib.contextmanager
def running(function: str, way: str) -> Iterator[Callable[..., Case]]:
    """Runs the norm in that way until it ends; what it yields makes cases for it."""
    with contextlib.ExitStack() as stack:
        if function in PLANES:
            make: Callable[..., Case] = stack.enter_context(channel_norm_ways.running(way)).case
        elif function in ROWS:
            make = stack.enter_context(_rows_running(way))
        else:
            make = stack.enter_context(batch_norm_cases.running(way)).case
        yield functools.partial(make, function)


@contextlib.contextmanager
def _rows_running(way: str) -> Iterator[Callable[..., Case]]:
    shape, chunks = ROW_WAYS[way]

    def make(function: str, **fields: Any) -> Case:
        if way == "rows walked back":
            fields["frozen"] = ("weight", "bias")
        return row_norm_cases.make_case(function, *shape, **fields)

    with pytest.MonkeyPatch.context() as patch:
        schedule = Schedule(patch)
        if chunks is not None:
            _, *block = chunks
            schedule.forward(*chunks)
            schedule.backward(*block, stripes=2, columns=64)
            if way == "rows walked back":
                schedule.backward_walk(64)
        try:
            yield make
        finally:
            patch.undo()
            forget_schedules()


def ways_of(function: str) -> tuple[str, ...]:
    if function in ROWS:
        return tuple(ROW_WAYS)
    return channel_norm_ways.WAYS if function in PLANES else batch_norm_cases.WAYS


def wide(case: Case) -> Case:
    """The case on a float32 stream."""
    assert case.residual is not None and case.dtotal is not None
    return with_fields(case, residual=case.residual.float(), dtotal=case.dtotal.float())


def factor(shape: tuple[int, ...], p: float, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """What kernels multiply the elements of such an x by under this seed."""
    ones, zeros = (fill(shape, dtype=dtype, device=DEVICE) for fill in (torch.ones, torch.zeros))
    torch.manual_seed(seed)
    with torch.no_grad(), fused_ops.use_backend("triton"):
        return F.residual_add(ones, zeros, dropout_p=p)


# --- all six, as functions of x and residual -----------------------------------------------------------------------

SIX = (*FUNCTIONS, "add_switch_norm")


def call(function: str, x: Tensor, residual: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    """(y, total) of a norm without parameters: rows over the last dim, groups of two channels, in training."""
    if function in ROWS:
        return getattr(F, function)(x, residual, x.shape[-1:], **keywords)
    if function == "add_group_norm":
        keywords["num_groups"] = x.shape[1] // 2
    if function == "add_batch_norm":
        keywords = {"running_mean": None, "running_var": None, "training": True, **keywords}
    if function == "add_switch_norm":
        kinds = 2 if x.dim() == 2 else 3
        shares = {
            f"{name}_weight": torch.linspace(0, 1, kinds, dtype=x.dtype, device=DEVICE) for name in ("mean", "var")
        }
        absent = dict.fromkeys(("running_mean", "running_var", "weight", "bias"))
        keywords = {**absent, "training": True, **shares, **keywords}
    return getattr(F, function)(x, residual, **keywords)
