"""A whole model's step: as its author has it, after fuse(model), and both compiled."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fused_ops

from . import compilations, memory, timing
from .measure import Settings, finish, first_line
from .peers import COMPILED, EAGER, OURS, OURS_COMPILED, forget_compiled
from .records import MODEL, Measurement, Row
from .traffic import DIRECTIONS, Direction
from .whole_models import WholeModel

# How much further from float64 than the author's own model a contender may be: both round, in different places.
ERROR_OVER_EAGER = 3.0
COMPILING_IS_SLOW = "compiling a model takes long on a CPU: only with --full"

CONTENDERS = (OURS, EAGER, COMPILED, OURS_COMPILED)


@dataclass(frozen=True)
class _Twins:
    """The author's model, the same after fuse, both with the same parameters, and the first in float64."""

    plain: nn.Module
    fused: nn.Module
    exact: nn.Module

    @classmethod
    def of(cls, plain: nn.Module) -> _Twins:
        exact = copy.deepcopy(plain).double()
        fused = copy.deepcopy(plain, {id(parameter): parameter for parameter in plain.parameters()})
        return cls(plain, fused_ops.fuse(fused), exact)

    def train(self, mode: bool) -> None:
        for model in (self.plain, self.fused, self.exact):
            model.train(mode)


def measure_model(model: WholeModel, dtype: torch.dtype, settings: Settings) -> Iterator[Row]:
    """A row for inference and one for a step of training, the optimizer's part left out."""
    forget_compiled()
    shape = model.shape(settings.size)
    problem = ""
    try:
        twins = _Twins.of(model.build(settings.size, dtype, settings.device))
        x = model.example(settings.size, dtype, settings.device)
    except RuntimeError as error:
        if not memory.is_exhausted(error):
            raise
        problem = first_line(error)
    for direction in DIRECTIONS:
        row = Row(model.name, MODEL, shape, str(dtype).removeprefix("torch."), direction, None)
        if problem:
            row.measurements.append(Measurement(OURS, "failed", problem))
        else:
            twins.train(direction != "forward")
            with torch.no_grad() if direction == "forward" else contextlib.nullcontext():
                _fill(row, twins, x, direction, settings)
        yield row


def _fill(row: Row, twins: _Twins, x: Tensor, direction: Direction, settings: Settings) -> None:
    gap = COMPILING_IS_SLOW if settings.device.type == "cpu" and not settings.compile_all else ""
    called: dict[str, Callable[[Tensor], Tensor]] = {EAGER: twins.plain, OURS: twins.fused}
    if not gap:
        called[COMPILED] = torch.compile(twins.plain, dynamic=False)
        called[OURS_COMPILED] = torch.compile(twins.fused, dynamic=False)
    try:
        gate = _Gate(twins, x, direction)  # in float64, which takes more memory than all that is timed
    except RuntimeError as error:
        if not memory.is_exhausted(error):
            raise
        no_room = f"no room for the float64 it is held against: {first_line(error)}"
        row.measurements.extend(Measurement(name, "unavailable", no_room) for name in CONTENDERS)
        return
    found: dict[str, Measurement] = {}
    runs: dict[str, timing.Run] = {}
    for name, call in called.items():
        run = functools.partial(step, call, x, list(twins.plain.parameters()), direction)
        try:
            found[name] = _admit(name, run, call, x, twins.plain, gate, settings.device)
        except Exception as error:  # a compiler may fail in any way, and the others are measured all the same
            found[name] = Measurement(name, "failed", first_line(error))
        if found[name].status == "timed":
            runs[name] = run
    in_order = {name: found.get(name, Measurement(name, "skipped", gap)) for name in CONTENDERS}
    finish(row, in_order, runs, {}, settings)


def step(
    call: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor], direction: Direction
) -> tuple[Tensor, ...]:
    """What inference returns; or the gradients of all parameters, for an output gradient of ones."""
    y = call(x)
    if direction == "forward":
        return (y,)
    return torch.autograd.grad(y, tuple(parameters), torch.ones_like(y), allow_unused=True)


class _Gate:
    """Lets through what is about as near to float64 as the author's model is in the type it runs in."""

    def __init__(self, twins: _Twins, x: Tensor, direction: Direction) -> None:
        self.expected = step(twins.exact, x.double(), list(twins.exact.parameters()), direction)
        own = self.error(step(twins.plain, x, list(twins.plain.parameters()), direction))
        self.allowed = ERROR_OVER_EAGER * own + 4 * torch.finfo(x.dtype).eps

    def error(self, found: Sequence[Any]) -> float:
        """The largest error of a tensor, in the root mean square, as a share of its size.

        A gradient that is nothing but rounding, as of a bias in front of a norm, is a share of the others' size.
        """
        least = 1e-2 * max(_size(want) for want in self.expected if want is not None)
        return max(
            _size(got.double() - want) / max(_size(want), least)
            for got, want in zip(found, self.expected, strict=True)
            if want is not None
        )


def _size(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()


def _admit(
    name: str,
    run: Callable[[], Sequence[Tensor]],
    call: Callable[[Tensor], Tensor],
    x: Tensor,
    model: nn.Module,
    gate: _Gate,
    device: torch.device,
) -> Measurement:
    first_seconds, compiled = compilations.first_call(run, device)
    error = gate.error(run()) / gate.allowed
    if not error <= 1.0:
        return Measurement(name, "wrong", f"it differs from float64 by {error:.2g} times what is allowed", error=error)
    return Measurement(
        name,
        "timed",
        error=error,
        peak_bytes=memory.peak_bytes(run, device),
        kept_bytes=memory.held_bytes(lambda: call(x), model.parameters()) if torch.is_grad_enabled() else None,
        first_seconds=first_seconds,
        compilations=compiled,
    )
