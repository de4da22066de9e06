"""torch.library ops over the launchers, for what traces: torch.compile, export, make_fx, FakeTensor.

Eager calls go to the launchers directly, which costs a quarter of going through an op. An op may not return an input or
None, so what is absent is an empty tensor.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from .autograd import Needs, Saved, gradients, what_to_save
from .kernels.row_norm import Gradients, RowNorm, Wanted, compute_dtype, row_norm_forward
from .kernels.row_norm import row_norm_backward as launch_backward

Tensor = torch.Tensor

_NORM = "int span, float eps, bool subtract_mean, bool add_first, str? activation, float alpha, float beta"
_SCHEMAS = {
    "row_norm_forward": (
        f"(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, {_NORM}, bool save_statistics, bool save_bits) -> "
        "(Tensor y, Tensor total, Tensor mean, Tensor rstd, Tensor bits)"
    ),
    "row_norm_backward": (
        "(Tensor dy, Tensor? dtotal, Tensor? x, Tensor? residual, Tensor? bits, Tensor? weight, Tensor? bias, "
        f"Tensor? mean, Tensor? rstd, {_NORM}, "
        "bool wants_dx, bool wants_dresidual, bool wants_dweight, bool wants_dbias) -> "
        "(Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
    ),
}

_library = torch.library.Library("fused_ops", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)


def _or_empty(like: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


def _or_none(*tensors: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(tensor if tensor.numel() else None for tensor in tensors)


# --- implementations and fakes -------------------------------------------------------------------------------------


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *arguments: Any):  # type: ignore[no-untyped-def]
    *norm, save_statistics, save_bits = arguments
    out = row_norm_forward(
        x, residual, weight, bias, RowNorm(*norm), save_statistics=save_statistics, save_bits=save_bits
    )
    return _or_empty(x, *out)


def _forward_fake(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *arguments: Any):  # type: ignore[no-untyped-def]
    *fields, save_statistics, save_bits = arguments
    norm = RowNorm(*fields)
    rows = x.numel() // max(1, norm.span)
    statistics = x.new_empty((rows,), dtype=compute_dtype(x.dtype))
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty_like(residual, memory_format=torch.contiguous_format) if norm.add_first else x.new_empty(0),  # type: ignore[arg-type]
        torch.empty_like(statistics) if save_statistics and norm.subtract_mean else x.new_empty(0),
        statistics if save_statistics else x.new_empty(0),
        x.new_empty((rows, (norm.span + 7) // 8), dtype=torch.uint8) if save_bits else x.new_empty(0),
    )


def _backward(dy: Tensor, *arguments: Any):  # type: ignore[no-untyped-def]
    dtotal, x, residual, bits, weight, bias, mean, rstd = arguments[:8]
    norm, wanted = RowNorm(*arguments[8:15]), Wanted(*arguments[15:])
    return _or_empty(dy, *launch_backward(dy, dtotal, x, residual, bits, weight, bias, mean, rstd, norm, wanted))


def _backward_fake(dy: Tensor, *arguments: Any):  # type: ignore[no-untyped-def]
    _, x, _, _, weight, bias = arguments[:6]
    norm, wanted = RowNorm(*arguments[8:15]), Wanted(*arguments[15:])
    dresidual_dtype = x.dtype if norm.add_first and x is not None else dy.dtype
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(dy, memory_format=contiguous) if wanted.dx else dy.new_empty(0),
        torch.empty_like(dy, dtype=dresidual_dtype, memory_format=contiguous) if wanted.dresidual else dy.new_empty(0),
        weight.new_empty((norm.span,)) if wanted.dweight else dy.new_empty(0),
        bias.new_empty((norm.span,)) if wanted.dbias else dy.new_empty(0),
    )


_library.impl("row_norm_forward", _forward, "CompositeExplicitAutograd")
_library.impl("row_norm_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("fused_ops::row_norm_forward", _forward_fake, lib=_library)
torch.library.register_fake("fused_ops::row_norm_backward", _backward_fake, lib=_library)


# --- autograd of the forward op ------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, residual, weight, bias, *fields, save_statistics, save_bits = inputs
    _, total, mean, rstd, bits = output
    norm = RowNorm(*fields)
    ctx.mark_non_differentiable(mean, rstd, bits)
    mean, rstd, bits = _or_none(mean, rstd, bits)
    saving = what_to_save(norm, Needs(*ctx.needs_input_grad[:4]), residual is not None)
    normalized = (total if norm.add_first else x) if saving.statistics else None
    residual = residual if saving.residual else None
    if (saving.statistics and not save_statistics) or (saving.bits and not save_bits):
        # Traced for inference, run for training: keep what backward can compute everything from.
        normalized, residual = (total, None) if norm.add_first else (x, inputs[1])
        mean = rstd = bits = None
    ctx.save_for_backward(*Saved(normalized, residual, weight, bias, mean, rstd, bits))
    ctx.norm, ctx.x_dtype = norm, x.dtype
    ctx.set_materialize_grads(False)


def row_norm_backward(dy: Tensor, *arguments: Any) -> Gradients:
    """The launcher of that name, as an op that a tracer sees."""
    *tensors, norm, wanted = arguments
    found = torch.ops.fused_ops.row_norm_backward(dy, *tensors, *norm, *wanted)
    return Gradients(*(tensor if want else None for tensor, want in zip(found, wanted, strict=True)))


def _forward_autograd(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *unused: Tensor | None):  # type: ignore[no-untyped-def]
    needs = Needs(*ctx.needs_input_grad[:4])
    dtotal = dtotal if ctx.norm.add_first else None
    found = gradients(Saved(*ctx.saved_tensors), dy, dtotal, ctx.norm, ctx.x_dtype, needs, row_norm_backward)
    return *found, *(None,) * 9


torch.library.register_autograd(
    "fused_ops::row_norm_forward", _forward_autograd, setup_context=_setup_context, lib=_library
)


def row_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, norm: RowNorm
) -> Tensor | tuple[Tensor, Tensor]:
    """`autograd.row_norm`, as an op that a tracer sees."""
    tensors = (x, residual, weight, bias)
    tracked = torch.is_grad_enabled()
    needs = Needs(*(tracked and tensor is not None and tensor.requires_grad for tensor in tensors))
    saving = what_to_save(norm, needs, residual is not None)
    y, total, *_ = torch.ops.fused_ops.row_norm_forward(*tensors, *norm, saving.statistics, saving.bits)
    return (y, total) if norm.add_first else y


# --- sample inputs -------------------------------------------------------------------------------------------------


def sample_inputs(name: str, device: torch.device | str | None = None) -> Iterator[tuple[tuple, dict]]:
    """Yields (args, kwargs) for `torch.library.opcheck` of the op of that name, without namespace or overload.

    They cover every optional argument present and absent, both norms and both places of the residual. On `device`, or a
    GPU where there is one, or the CPU (for interpreted kernels). Raises ValueError for an unknown name.
    """
    if name not in _SCHEMAS:
        raise ValueError(f"unknown op {name!r}; known are {', '.join(_SCHEMAS)}")
    return _samples(name, device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _samples(name: str, device: torch.device | str) -> Iterator[tuple[tuple, dict]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, requires_grad: bool = True) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device).requires_grad_(requires_grad)

    cases = itertools.product((None, "after", "first"), (None, "relu", "gelu"), (True, False), (True, False))
    for added, activation, subtract_mean, affine in cases:
        norm = RowNorm(20, 1e-5, subtract_mean, added == "first", activation)
        requires_grad = name == "row_norm_forward"
        x, residual = (draw(2, 3, 20, requires_grad=requires_grad) for _ in range(2))
        weight, bias = (draw(20, requires_grad=requires_grad) if affine else None for _ in range(2))
        has_residual = added is not None
        saving = what_to_save(norm, Needs(True, has_residual, affine, affine), has_residual)
        tensors = (x, residual if has_residual else None, weight, bias)
        if name == "row_norm_forward":
            yield (*tensors, *norm, saving.statistics, saving.bits), {}
            if not affine:  # for inference, where nothing is saved
                yield (x.detach(), residual.detach() if has_residual else None, None, None, *norm, False, False), {}
            continue
        out = row_norm_forward(*tensors, norm, save_statistics=saving.statistics, save_bits=saving.bits)
        normalized = out.total if norm.add_first else x
        kept = residual if saving.residual else None
        dy, dtotal = draw(2, 3, 20, requires_grad=False), draw(2, 3, 20, requires_grad=False)
        wanted = Wanted(True, added == "after" and activation is not None, affine, affine)
        saved = (normalized, kept, out.bits, weight, bias, out.mean, out.rstd)
        yield (dy, dtotal if norm.add_first else None, *saved, *norm, *wanted), {}
