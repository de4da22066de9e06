"""torch.library ops over the launchers, for what traces: torch.compile, export, make_fx, FakeTensor.

Eager calls go to the launchers directly, which costs a quarter of going through an op. An op may not return an input or
None, so what is absent is an empty tensor; nor may one that changes an argument have a gradient, so batch norm's
forward returns the running statistics as they are afterwards, and `run` stores them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import residual_ops
from .autograd import Needs, Saved, gradients, is_frozen, what_to_save, without_seed
from .kernels.families import BATCH_NORM, GROUP_NORM, ROW_NORM, Family, family_of
from .kernels.problem import BatchNorm, Gradients, GroupNorm, Norm, RowNorm, Wanted
from .op_library import LIBRARY, define, or_empty, or_none

Tensor = torch.Tensor
Tensors = tuple[Tensor | None, ...]

_FUSED = "bool add_first, str? activation, float alpha, float beta, float dropout_p, Tensor? seed"
NormType = type[RowNorm] | type[GroupNorm] | type[BatchNorm]
# A norm's own arguments, as fields of what the launchers take.
_NORMS: dict[str, tuple[Family, NormType, str]] = {
    "row_norm": (ROW_NORM, RowNorm, f"int span, float eps, bool subtract_mean, {_FUSED}"),
    "group_norm": (GROUP_NORM, GroupNorm, f"int groups, bool channels_last, float eps, {_FUSED}"),
    "batch_norm": (
        BATCH_NORM,
        BatchNorm,
        f"bool channels_last, bool training, float momentum, float eps, {_FUSED}",
    ),
}
_FORWARD = (
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, {running}{norm}, bool save_statistics, bool save_bits) "
    "-> (Tensor y, Tensor total, Tensor mean, Tensor rstd, Tensor bits{moved})"
)
_RUNNING = ("Tensor? running_mean, Tensor? running_var, ", ", Tensor moved_mean, Tensor moved_var")
_BACKWARD = (
    "(Tensor dy, Tensor? dtotal, Tensor? x, Tensor? residual, Tensor? bits, Tensor? weight, Tensor? bias, "
    "Tensor? mean, Tensor? rstd, {norm}, "
    "bool wants_dx, bool wants_dresidual, bool wants_dweight, bool wants_dbias) -> "
    "(Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)


def _parts(norm_type: NormType, arguments: tuple[Any, ...]) -> tuple[Tensors, Norm, bool, bool]:
    """(running statistics, norm, save_statistics, save_bits) of a forward op's arguments behind the bias."""
    count = 2 if norm_type is BatchNorm else 0
    return arguments[:count], norm_type(*arguments[count:-2]), *arguments[-2:]


def _moved(norm: Norm, running: Tensors, make: Callable[[Tensor], Tensor]) -> Tensors:
    """Tensors for the running statistics after the call, where it moves them."""
    moves = isinstance(norm, BatchNorm) and norm.training
    return tuple(make(tensor) if moves and tensor is not None else None for tensor in running)


def _define(name: str, family: Family, norm_type: NormType, fields: str) -> None:
    """The forward and the backward op of a norm: schema, implementation, fake and autograd."""

    def forward(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *arguments: Any):  # type: ignore[no-untyped-def]
        running, norm, statistics, bits = _parts(norm_type, arguments)
        moved = _moved(norm, running, torch.clone)
        given = [old if new is None else new for old, new in zip(running, moved, strict=True)]
        out = family.forward(x, residual, weight, bias, norm, *given, save_statistics=statistics, save_bits=bits)
        return or_empty(x, *out, *moved)

    def forward_fake(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *arguments: Any):  # type: ignore[no-untyped-def]
        running, norm, statistics, bits = _parts(norm_type, arguments)
        moved = _moved(norm, running, torch.empty_like)
        return or_empty(x, *family.allocate(x, residual, norm, statistics, bits), *moved)

    def backward(dy: Tensor, *arguments: Any):  # type: ignore[no-untyped-def]
        norm, wanted = norm_type(*arguments[8:-4]), Wanted(*arguments[-4:])
        return or_empty(dy, *family.backward(dy, *arguments[:8], norm, wanted))

    def backward_fake(dy: Tensor, *arguments: Any):  # type: ignore[no-untyped-def]
        _, x, _, _, weight, bias = arguments[:6]
        norm, wanted = norm_type(*arguments[8:-4]), Wanted(*arguments[-4:])
        dweight, dbias = (
            parameter.new_empty((parameter.numel(),)) if want else None
            for parameter, want in ((weight, wanted.dweight), (bias, wanted.dbias))
        )
        return or_empty(dy, *family.allocate_gradients(dy, x, norm, wanted), dweight, dbias)

    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _setup_context(ctx, norm_type, inputs, output)

    running, moved = _RUNNING if norm_type is BatchNorm else ("", "")
    for op, schema, run, fake in (
        (f"{name}_forward", _FORWARD.format(norm=fields, running=running, moved=moved), forward, forward_fake),
        (f"{name}_backward", _BACKWARD.format(norm=fields), backward, backward_fake),
    ):
        define(op, schema, run, fake)
    torch.library.register_autograd(
        f"fused_ops::{name}_forward", _forward_autograd, setup_context=setup_context, lib=LIBRARY
    )


# --- autograd of the forward ops -----------------------------------------------------------------------------------


def _setup_context(ctx: Any, norm_type: NormType, inputs: tuple, output: tuple) -> None:
    x, residual, weight, bias, *arguments = inputs
    _, norm, save_statistics, save_bits = _parts(norm_type, tuple(arguments))
    _, total, mean, rstd, bits, *_ = output
    ctx.mark_non_differentiable(*output[2:])
    mean, rstd, bits = or_none(mean, rstd, bits)
    saving = what_to_save(norm, Needs(*ctx.needs_input_grad[:4]), residual is not None)
    normalized = (total if norm.add_first else x) if saving.x else None
    residual = residual if saving.residual else None
    if (saving.statistics and not save_statistics) or (saving.bits and not save_bits):
        # Traced for inference, run for training: keep what backward can compute everything from.
        normalized, residual = (total, None) if norm.add_first else (x, inputs[1])
        bits = None
        if not is_frozen(norm):  # its statistics are always saved: they are no functions of x
            mean = rstd = None
    ctx.save_for_backward(*Saved(normalized, residual, weight, bias, mean, rstd, bits, norm.seed))
    ctx.norm, ctx.x_dtype, ctx.inputs = without_seed(norm), x.dtype, len(inputs)
    ctx.set_materialize_grads(False)


def _forward_autograd(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *unused: Tensor | None):  # type: ignore[no-untyped-def]
    needs = Needs(*ctx.needs_input_grad[:4])
    dtotal = dtotal if ctx.norm.add_first else None
    saved = Saved(*ctx.saved_tensors)
    found = gradients(saved, dy, dtotal, saved.of_call(ctx.norm), ctx.x_dtype, needs, backward)
    return *found, *(None,) * (ctx.inputs - len(needs))


for _name, _norm in _NORMS.items():
    _define(_name, *_norm)


def backward(dy: Tensor, *arguments: Any) -> Gradients:
    """The launcher of the norm among the arguments, as an op that a tracer sees."""
    *tensors, norm, wanted = arguments
    op = getattr(torch.ops.fused_ops, f"{family_of(norm).name}_backward")
    found = op(dy, *tensors, *norm, *wanted)
    return Gradients(*(tensor if want else None for tensor, want in zip(found, wanted, strict=True)))


def plan(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    *running: Tensor | None,
) -> Callable[..., Any]:
    """`planned.plan`, as an op that a tracer sees."""
    tensors = (x, residual, weight, bias)
    tracked = torch.is_grad_enabled()
    needs = Needs(*(tracked and tensor is not None and tensor.requires_grad for tensor in tensors))
    saving = what_to_save(norm, needs, residual is not None)
    op = getattr(torch.ops.fused_ops, f"{family_of(norm).name}_forward")
    kept = saving.statistics or is_frozen(norm), saving.bits

    def run(
        seed: Tensor | None,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        momentum: float = 0.0,
    ) -> Any:
        of_call: Norm = norm._replace(seed=seed)
        running: Tensors = ()
        if isinstance(of_call, BatchNorm):
            of_call, running = of_call._replace(momentum=momentum), (running_mean, running_var)
        y, total, _, _, _, *moved = op(x, residual, weight, bias, *running, *of_call, *kept)
        for statistic, values in zip(running, moved, strict=True):
            if statistic is not None and not is_frozen(norm):
                statistic.copy_(values)
        return (y, total) if norm.add_first else y

    return run


# --- sample inputs -------------------------------------------------------------------------------------------------


def sample_inputs(name: str, device: torch.device | str | None = None) -> Iterator[tuple[tuple, dict]]:
    """Yields (args, kwargs) for `torch.library.opcheck` of the op of that name, without namespace or overload.

    They cover every optional argument present and absent, every norm, layout and place of the residual. On `device`, or
    a GPU where there is one, or the CPU (for interpreted kernels). Raises ValueError for an unknown name.
    """
    known = [f"{norm}_{direction}" for norm in (*_NORMS, "residual_add") for direction in ("forward", "backward")]
    if name not in known:
        raise ValueError(f"unknown op {name!r}; known are {', '.join(known)}")
    family, _, direction = name.rpartition("_")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if family == "residual_add":
        return residual_ops.samples(direction == "forward", device)
    return _samples(family, direction == "forward", device)


def _norms(family: str, add_first: bool, activation: str | None) -> list[tuple[Norm, tuple[int, ...], int]]:
    """Norms of a family, each with the shape of an x and the length of a weight."""
    if family == "row_norm":
        return [(RowNorm(20, 1e-5, mean, add_first, activation), (2, 3, 20), 20) for mean in (True, False)]
    if family == "batch_norm":
        ways = ((True, True), (False, True), (False, False))
        return [(BatchNorm(*way, 0.1, 1e-5, add_first, activation), (2, 4, 3, 5), 4) for way in ways]
    return [(GroupNorm(2, last, 1e-5, add_first, activation), (2, 4, 3, 5), 4) for last in (True, False)]


def _samples(family: str, forward: bool, device: torch.device | str) -> Iterator[tuple[tuple, dict]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, requires_grad: bool = True) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device).requires_grad_(requires_grad)

    for added, activation, affine in itertools.product((None, "after", "first"), (None, "relu", "gelu"), (True, False)):
        for norm, shape, length in _norms(family, added == "first", activation):
            drops = added == "first" and affine
            if drops:
                norm = norm._replace(dropout_p=0.25, seed=torch.tensor([7], device=device))
            x, residual = (draw(*shape, requires_grad=forward) for _ in range(2))
            weight, bias = (draw(length, requires_grad=forward) if affine else None for _ in range(2))
            running: Tensors = ()
            if isinstance(norm, BatchNorm):
                known = affine or not norm.training
                running = tuple(draw(length, requires_grad=False).abs() if known else None for _ in range(2))
            has_residual = added is not None
            saving = what_to_save(norm, Needs(True, has_residual, affine, affine), has_residual)
            tensors = (x, residual if has_residual else None, weight, bias)
            if forward:
                yield (*tensors, *running, *norm, saving.statistics, saving.bits), {}
                if not affine:  # for inference, where nothing is saved
                    tensors = (x.detach(), residual.detach() if has_residual else None, None, None)
                    yield (*tensors, *running, *norm, is_frozen(norm), False), {}
                continue
            out = family_of(norm).forward(
                *tensors, norm, *running, save_statistics=saving.statistics, save_bits=saving.bits
            )
            normalized = (out.total if norm.add_first else x) if saving.x else None
            kept = residual if saving.residual else None
            dy, dtotal = draw(*shape, requires_grad=False), draw(*shape, requires_grad=False)
            wanted = Wanted(True, drops or (added == "after" and activation is not None), affine, affine)
            saved = (normalized, kept, out.bits, weight, bias, out.mean, out.rstd)
            yield (dy, dtotal if norm.add_first else None, *saved, *norm, *wanted), {}
