"""torch.library ops over the launchers of the residual stream (see `ops`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .kernels.problem import ResidualAdd
from .kernels.residual import (
    Added,
    SumGradients,
    WantedOfSum,
    allocate,
    allocate_gradients,
    residual_add_backward,
    residual_add_forward,
)
from .op_library import LIBRARY, define, or_empty, or_none
from .residual_autograd import Needs, Saved, facts_of, gradients, what_to_save

Tensor = torch.Tensor

_FIELDS = "float dropout_p, float drop_path_p, str? activation, float alpha, float beta"
_FORWARD = (
    f"(Tensor x, Tensor residual, Tensor? scale, Tensor? seed, {_FIELDS}, bool save_bits) -> (Tensor y, Tensor bits)"
)
_BACKWARD = (
    f"(Tensor dy, Tensor? x, Tensor? residual, Tensor? scale, Tensor? bits, Tensor? seed, {_FIELDS}, "
    "bool wants_dx, bool wants_dresidual, bool wants_dscale, SymInt[] strides, ScalarType x_dtype) -> "
    "(Tensor dx, Tensor dresidual, Tensor dscale)"
)
_FIELD_COUNT = len(ResidualAdd._fields)


def _forward(x: Tensor, residual: Tensor, scale: Tensor | None, seed: Tensor | None, *arguments: Any):  # type: ignore[no-untyped-def]
    *fields, save_bits = arguments
    return or_empty(x, *residual_add_forward(x, residual, scale, seed, ResidualAdd(*fields), save_bits=save_bits))


def _forward_fake(x: Tensor, residual: Tensor, scale: Tensor | None, seed: Tensor | None, *arguments: Any):  # type: ignore[no-untyped-def]
    return or_empty(x, *allocate(x, residual, arguments[-1]))


def _backward_parts(*arguments: Any) -> tuple[ResidualAdd, WantedOfSum, Sequence[int], torch.dtype]:
    *numbers, strides, x_dtype = arguments
    return ResidualAdd(*numbers[:_FIELD_COUNT]), WantedOfSum(*numbers[_FIELD_COUNT:]), strides, x_dtype


def _backward(dy: Tensor, *arguments: Any):  # type: ignore[no-untyped-def]
    x, residual, scale, bits, seed, *others = arguments
    return or_empty(dy, *residual_add_backward(dy, x, residual, scale, bits, seed, *_backward_parts(*others)))


def _backward_fake(dy: Tensor, *arguments: Any):  # type: ignore[no-untyped-def]
    _, _, scale, _, _, *others = arguments
    _, wanted, strides, x_dtype = _backward_parts(*others)
    dscale = torch.empty_like(scale, memory_format=torch.contiguous_format) if wanted.dscale else None
    return or_empty(dy, *allocate_gradients(dy, strides, x_dtype, wanted), dscale)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, scale, seed, *fields, save_bits = inputs
    y, bits = output
    ctx.mark_non_differentiable(bits)
    problem = ResidualAdd(*fields)
    saving = what_to_save(problem, Needs(*ctx.needs_input_grad[:3]))
    has_bits = saving.bits and save_bits
    # Traced for inference, run for training: keep what backward can compute everything from.
    recomputes = saving.residual or (saving.bits and not save_bits)
    ctx.save_for_backward(
        *Saved(
            x if saving.x or recomputes else None,
            residual if recomputes else None,
            scale if saving.scale or recomputes else None,
            or_none(bits)[0] if has_bits else None,
            seed,
        )
    )
    ctx.problem, ctx.facts = problem, facts_of(y.stride(), x, scale)
    ctx.inputs = len(inputs)


def _forward_autograd(ctx: Any, dy: Tensor, unused: Tensor | None):  # type: ignore[no-untyped-def]
    found = gradients(Saved(*ctx.saved_tensors), dy, ctx.problem, ctx.facts, Needs(*ctx.needs_input_grad[:3]), backward)
    return *found, *(None,) * (ctx.inputs - len(found))


define("residual_add_forward", _FORWARD, _forward, _forward_fake)
define("residual_add_backward", _BACKWARD, _backward, _backward_fake)
torch.library.register_autograd(
    "fused_ops::residual_add_forward", _forward_autograd, setup_context=_setup_context, lib=LIBRARY
)


def forward(
    x: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    seed: Tensor | None,
    problem: ResidualAdd,
    *,
    save_bits: bool = False,
) -> Added:
    """`residual_add_forward`, as an op that a tracer sees."""
    y, bits = torch.ops.fused_ops.residual_add_forward(x, residual, scale, seed, *problem, save_bits)
    return Added(y, bits if save_bits else None)


def backward(
    dy: Tensor,
    x: Tensor | None,
    residual: Tensor | None,
    scale: Tensor | None,
    bits: Tensor | None,
    seed: Tensor | None,
    problem: ResidualAdd,
    wanted: WantedOfSum,
    *facts: Any,
) -> SumGradients:
    """`residual_add_backward`, as an op that a tracer sees."""
    op = torch.ops.fused_ops.residual_add_backward
    found = op(dy, x, residual, scale, bits, seed, *problem, *wanted, *facts)
    return SumGradients(*(tensor if want else None for tensor, want in zip(found, wanted, strict=True)))


def plan(x: Tensor, residual: Tensor, scale: Tensor | None, problem: ResidualAdd) -> Callable[..., Tensor]:
    """`residual_autograd.plan`, as an op that a tracer sees."""
    tracked = torch.is_grad_enabled()
    needs = Needs(*(tracked and tensor is not None and tensor.requires_grad for tensor in (x, residual, scale)))
    save_bits = what_to_save(problem, needs).bits
    return lambda x, residual, scale, seed: forward(x, residual, scale, seed, problem, save_bits=save_bits).y


def samples(forward: bool, device: torch.device | str) -> Iterator[tuple[tuple, dict]]:
    """(args, kwargs) of the one op or the other, with every optional argument present and absent."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, requires_grad: bool = False) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device).requires_grad_(requires_grad)

    seed = torch.tensor([7], device=device)
    shapes = (None, (4,), (4, 1, 1))
    for shape, activation, (dropout_p, drop_path_p) in itertools.product(
        shapes, (None, "relu", "gelu"), ((0.0, 0.0), (0.25, 0.0), (0.5, 0.25))
    ):
        x, residual = (draw(2, 4, 5, 4, requires_grad=forward) for _ in range(2))
        scale = None if shape is None else draw(*shape, requires_grad=forward)
        drops = seed if dropout_p or drop_path_p else None
        problem = ResidualAdd(dropout_p, drop_path_p, activation)
        saving = what_to_save(problem, Needs(True, True, scale is not None))
        if forward:
            yield (x, residual, scale, drops, *problem, saving.bits), {}
            continue
        y, bits = residual_add_forward(x, residual, scale, drops, problem, save_bits=saving.bits)
        saved = (x if saving.x else None, residual if saving.residual else None, scale, bits, drops)
        wanted = WantedOfSum(True, activation is not None, scale is not None)
        yield (draw(*x.shape), *saved, *problem, *wanted, y.stride(), x.dtype), {}
