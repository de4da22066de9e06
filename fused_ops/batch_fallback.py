"""`fallback` for batch norm: each channel by the statistics of the whole batch, and running statistics that follow.

torch's own batch_norm runs forward, and backward once. In training its third derivatives are wrong (seen in torch
2.13), and with a bias and no weight its second fail: a backward that is itself differentiated is elementary. Where
torch's own node can be left to find the gradients it is: it is in C++, and of a small call a Function is half the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.graph import increment_version

from .channel_fallback import (
    _by_channel,
    _through_norm,
    _values_are_here,
    _x_hat,
    plan_stored_norm,
    stored_norm,
    torchs_batch_norm,
)
from .fallback import (
    PLAIN,
    _common_dtype,
    _laid_out_as,
    _looked_into,
    _one_type,
    _takes_function,
    apply_of,
    but_channels,
    goes_on_from,
    intercepted,
    left_a_transform,
    of_type,
    transformed,
)
from .validation import HALF

Tensor = torch.Tensor


def plan_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    training: bool,
    eps: float,
) -> Callable[..., Tensor]:
    """torch's batch_norm of tensors like these, as a function of them and the momentum; y is a new tensor, in x's type
    and layout whatever the other types are.

    In training the running statistics, if given, move in place: see `plan_put_back`.
    """
    if not training:
        assert running_mean is not None and running_var is not None
        return plan_stored_norm(x, running_mean, running_var, weight, bias, eps)
    if x.numel() == 0:  # where torch fails without channels, and running statistics stay as they are
        return lambda x, mean, var, weight, bias, momentum: stored_norm(
            x, x.new_zeros(x.shape[1]), x.new_ones(x.shape[1]), weight, bias, eps
        )
    dtype = _computed_in(x, running_mean, running_var, weight, bias)
    running = [tensor for tensor in (running_mean, running_var) if tensor is not None]
    learns = _takes_function(x, weight, bias)
    plain = {type(x), type(weight), type(bias)} <= PLAIN
    alone = plain and not left_a_transform(x, weight, bias, running_mean, running_var)
    if learns and alone:
        by_torch = _torch_finds_gradients(x, running, weight, bias)
        normalize, copies = (_plan_by_torchs_node(x) if by_torch else _apply), False
    elif alone and not _looked_into() and weight is not None and _one_type(dtype, x, weight, bias):
        normalize, copies = _as_they_are, False
    elif transformed():
        normalize, copies = _transformed, False
    else:
        # torch keeps for backward what it moves, which is then to stay as it is
        normalize, copies = _elsewhere, learns
    # torch's batch norm counts no version; what was made in inference mode has none.
    untold = running and not copies and (transformed() or not _looked_into())
    untold = untold and True not in [tensor.is_inference() for tensor in running]
    in_place = not running or (not copies and _one_type(dtype, *running))

    def move_in_place(x: Tensor, mean: Any, var: Any, weight: Any, bias: Any, momentum: float) -> Tensor:
        y = normalize(x, mean, var, weight, bias, momentum, eps, dtype)
        if untold:
            increment_version((mean, var))
        return y

    def move_copies(x: Tensor, mean: Any, var: Any, weight: Any, bias: Any, momentum: float) -> Tensor:
        moving_mean, moving_var = (tensor.to(dtype, copy=True) for tensor in (mean, var))
        y = normalize(x, moving_mean, moving_var, weight, bias, momentum, eps, dtype)
        move([mean, var], [moving_mean, moving_var])
        return y

    return move_in_place if in_place else move_copies


def _transformed(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    y = differentiable_batch_norm(x, weight, bias, eps).to(x.dtype)
    if mean is not None:  # a transform refuses a copy_ into what lies outside of it, but lets torch's own update pass
        with torch.no_grad():
            F.batch_norm(x.detach().to(dtype), mean, var, None, None, True, momentum, eps)
    return y


def _as_they_are(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    return _laid_out_as(x, torchs_batch_norm(x, mean, var, weight, bias, True, momentum, eps))


def _elsewhere(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    weight, bias = (None if parameter is None else of_type(parameter, dtype) for parameter in (weight, bias))
    weight = _beside(bias) if weight is None else weight
    y = F.batch_norm(_beside_parameters(x, dtype), mean, var, weight, bias, True, momentum, eps)
    return _laid_out_as(x, of_type(y, x.dtype))


def plan_put_back(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function of x, the residual, both running statistics, which it moves, and others: these are put back where it
    fails, unless under a transform, which refuses that."""
    if not _looked_into():

        def put_back(x: Tensor, residual: Tensor | None, mean: Tensor, var: Tensor, *others: Any) -> Any:
            copies = [mean.clone(), var.clone()]
            try:
                return run(x, residual, mean, var, *others)
            except BaseException:
                move([mean, var], copies)
                raise

        return put_back
    if transformed():
        return run

    def move_at_last(x: Tensor, residual: Tensor | None, mean: Tensor, var: Tensor, *others: Any) -> Any:
        copies = [mean.clone(), var.clone()]
        out = run(x, residual, *copies, *others)
        move([mean, var], copies)
        return out

    return move_at_last


def move(running: list[Tensor], moved: list[Tensor]) -> None:
    """Gives running statistics the values of those that moved in their place, if others did."""
    for tensor, found in zip(running, moved, strict=True):
        if found is not tensor:
            with torch.no_grad():
                tensor.copy_(found)


def _computed_in(x: Tensor, *others: Tensor | None) -> torch.dtype:
    """At least float32: with parameters in half precision torch's CPU kernel keeps mean and rstd in that, and with a
    mean of ten deviations dweight is off by percents."""
    return torch.promote_types(_common_dtype(x, *others), torch.float32)


def _beside_parameters(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as torch takes it beside parameters of this type: half x beside float32 ones, the one mixture."""
    return x if x.dtype in HALF and dtype == torch.float32 else of_type(x, dtype)


def _beside(bias: Tensor | None) -> Tensor | None:
    """A weight for a bias that has none: on a GPU torch's backward finds no device without one."""
    return None if bias is None else torch.ones_like(bias)


def _dense_layout(x: Tensor) -> torch.memory_format:
    """The one of the layouts that torch's backward takes on a GPU in which x is, or is to be copied."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]):
        return formats[x.dim()]
    return torch.contiguous_format


def _dense(x: Tensor) -> Tensor:
    """x in one of these layouts; its forward makes them by itself."""
    return x.contiguous(memory_format=_dense_layout(x))


class _BatchNorm(torch.autograd.Function):
    """torch's batch_norm in training, with right derivatives of every order; but for running statistics it keeps what
    torch keeps."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        scale, shift = (None if parameter is None else of_type(parameter, dtype) for parameter in (weight, bias))
        scale = _beside(shift) if scale is None else scale
        # All that F.batch_norm calls, which returns the first of these alone.
        y, mean, rstd, reserve, ctx.implementation = torch._batch_norm_impl_index(
            _beside_parameters(x, dtype),
            scale,
            shift,
            running_mean,
            running_var,
            True,
            momentum,
            eps,
            torch.backends.cudnn.enabled,
        )
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
            ctx.save_for_backward(x, mean, rstd, weight, reserve)
        else:
            ctx.save_for_backward(None, None, None, None, None)
        ctx.dtype, ctx.eps = dtype, eps
        return _laid_out_as(x, of_type(y, x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, reserve = ctx.saved_tensors
        needs_x, _, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        if x is None or goes_on_from(dy):
            dx, dweight, dbias = gradients(dy, x, weight, ctx.eps, needs_x, needs_weight, needs_bias)
        else:
            wide = _dense(_beside_parameters(x, ctx.dtype))
            # Contiguous: beside x in [N, C] or channels_last torch's CPU kernel goes by no strides of a weight.
            scale = None if weight is None else of_type(weight, ctx.dtype).contiguous()
            if scale is None and needs_bias:
                scale = torch.ones_like(mean)
            dx, dweight, dbias = torch.ops.aten._batch_norm_impl_index_backward(
                ctx.implementation,
                wide,
                # In x's layout: strides of dims of one element make torch's CPU kernel take two layouts for one.
                _laid_out_as(wide, of_type(dy, wide.dtype)),
                scale,
                None,  # the running statistics, which nothing depends on
                None,
                mean,
                rstd,
                True,
                ctx.eps,
                (needs_x, needs_weight, needs_bias),
                reserve,
            )
        # In the type that they were computed in; autograd casts each to its input's. cuDNN makes all three.
        return (
            dx if needs_x else None,
            None,
            None,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            None,
            None,
            None,
        )


_apply = apply_of(_BatchNorm)


def _torch_finds_gradients(x: Tensor, running: Sequence[Tensor], weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the node that torch's batch_norm leaves finds the first derivatives of tensors like these.

    Its CPU kernel takes two layouts for one by the strides of lone positions, and goes by no strides of a weight. It
    keeps x for whoever learns, and running statistics, though none for inference's.
    """
    if not _values_are_here(x, weight, bias) or intercepted() or weight is None or not weight.is_contiguous():
        return False
    if not _one_type(x.dtype, *running, weight, bias) or x.dtype in HALF or 1 in x.shape[2:] or _dense(x) is not x:
        return False
    return (x.requires_grad or weight.requires_grad) and True not in [tensor.is_inference() for tensor in running]


def _plan_by_torchs_node(x: Tensor) -> Callable[..., Tensor]:
    """torch's batch norm of tensors like x, whose node asks for dy in x's layout: others take it several times as
    long."""
    stride, layout = x.stride(), _dense_layout(x)

    def lay_out(given: Sequence[Tensor | None]) -> Any:
        """A hook that torch's node calls with dy and with nothing for the statistics."""
        dy, *others = given
        if dy is None:
            return None
        if goes_on_from(dy):
            _replace_gradients()
        return None if dy.stride() == stride else (dy.contiguous(memory_format=layout), *others)

    def run(
        x: Tensor, mean: Any, var: Any, weight: Tensor, bias: Any, momentum: float, eps: float, dtype: torch.dtype
    ) -> Tensor:
        if _hooks_of_saved(True) is not None:  # who packs what a node saves may be asked for it once
            return _apply(x, mean, var, weight, bias, momentum, eps, dtype)
        # The node keeps running statistics, which it does not need: others in the same memory, whose version stays.
        mean, var = None if mean is None else mean.data, None if var is None else var.data
        y = torch.batch_norm(x, weight, bias, mean, var, True, momentum, eps, False)
        if y.grad_fn is not None:  # there is none in inference mode
            y.grad_fn.register_prehook(lay_out)
        return y

    return run


_hooks_of_saved = torch._C._autograd._top_saved_tensors_default_hooks


def _replace_gradients() -> None:
    """Has the node that is about to run give gradients in elementary operations, this once, to whoever else has hooks.
    A compiler of backward runs none: there they are torch's own."""

    def replace(found: Sequence[Tensor | None], given: Sequence[Any]) -> tuple[Tensor | None, ...] | None:
        hook.remove()
        if not goes_on_from(given[0]):  # left over by a backward that failed
            return None
        needs_x, needs_weight, needs_bias = [gradient is not None for gradient in found]
        node = _running_node()
        x, weight, eps = node._saved_input, node._saved_weight, node._saved_eps
        return gradients(given[0], x, weight, eps, needs_x, needs_weight, needs_bias)

    if _running_node() is not None:
        hook = _running_node().register_hook(replace)
        hooks = hook.hooks_dict_ref()
        for other in [key for key in hooks if key != hook.id]:
            hooks[other] = hooks.pop(other)  # behind it: torch goes by the order of insertion alone


_running_node: Callable[[], Any] = torch._C._current_autograd_node  # a hook that held its node would keep it for ever


def differentiable_batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Batch norm by the input's statistics in elementary operations, in the type that kernels compute in."""
    dtype = _computed_in(x, weight, bias)
    y, _ = _x_hat(x.to(dtype), but_channels(x), eps)
    y = y if weight is None else y * _by_channel(weight, x, dtype)
    return y if bias is None else y + _by_channel(bias, x, dtype)


def gradients(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, eps: float, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias), each where needed, in elementary operations; any derivative of them is right.

    x may be None where dbias alone is needed.
    """
    dtype = _computed_in(dy, x, weight)
    dz = dy.to(dtype)
    batch = but_channels(dy)
    dx = dweight = None
    if x is not None:
        x_hat, rstd = _x_hat(x.to(dtype), batch, eps)
        if needs_x:
            dx_hat = dz if weight is None else dz * _by_channel(weight, dz, dtype)
            dx = _through_norm(dx_hat, x_hat, rstd, batch)
        if needs_weight:
            dweight = (dz * x_hat).sum(batch)
    return dx, dweight, dz.sum(batch) if needs_bias else None
