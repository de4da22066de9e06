"""The same functions as compositions of torch's: differentiable, traceable, and in place wherever autograd allows it.

It runs where Triton does not, under torch.func and forward-mode differentiation, and for second derivatives. Arguments
have been validated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .activation import Activation
from .validation import FLOATING, HALF

Tensor = torch.Tensor
Shape = tuple[int, ...]

PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


@torch.compiler.assume_constant_result  # torch.compile traces the transforms itself, and guards on those around it
def transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is active; both refuse in-place work here."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def left_a_transform(*tensors: Tensor | None) -> bool:
    """Whether a tensor was made under a torch.func transform and still wears its wrapper, which holds no memory."""
    if torch.compiler.is_compiling():
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return True in [tensor is not None and wrapped(tensor) for tensor in tensors]


def recorded() -> bool:
    """Whether torch.jit.trace records the operations."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def intercepted() -> bool:
    """Whether a mode of somebody's own intercepts torch's functions; the one of a default device changes none of ours,
    as each of them names its device."""
    return True in [type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()]


def _looked_into() -> bool:
    """Whether somebody compiles, traces or transforms the operations, for whom they are plain and out of place."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._get_tracing_state() is not None or transformed()


def _takes_function(*tensors: Tensor | None) -> bool:
    """Whether a Function of ours may stand for operations on these: something learns, and nobody traces or transforms
    them, who could not look into it."""
    if not torch.is_grad_enabled() or _looked_into():
        return False
    return True in [tensor is not None and tensor.requires_grad for tensor in tensors]


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """torch.autograd.Function.apply without its look for torch.func's transforms and the wrappers that they leave: for
    callers who have looked."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def goes_on_from(dy: Tensor) -> bool:
    """Whether a gradient is to be differentiated again, or is a batch of them: backward is then elementary."""
    if torch.is_grad_enabled() or transformed():
        return True
    # A compiler of backward has no batch, and warns of what it cannot look into.
    return not torch.compiler.is_dynamo_compiling() and torch._C._functorch.is_legacy_batchedtensor(dy)


class _Hardsigmoid(torch.autograd.Function):
    """F.hardsigmoid with a gradient that can be differentiated, as torch's own cannot."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return F.hardsigmoid(z)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return torch.where((z > -3) & (z < 3), dy / 6, 0.0)
        return torch.ops.aten.hardsigmoid_backward(dy, z)


def _hardsigmoid(z: Tensor) -> Tensor:
    if transformed():  # the same for a transform, which cannot look into a Function
        return F.relu6(z + 3) / 6
    if _takes_function(z):
        return _Hardsigmoid.apply(z)
    return F.hardsigmoid(z)


_OUT_OF_PLACE: dict[str, Callable[..., Tensor]] = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardsigmoid": _hardsigmoid,
    "softplus": F.softplus,
}

_nn: Any = torch._C._nn  # what F calls; its gelu_ F does not have, and torch.ops.aten's takes 3 us more

# Their gradient needs their result alone, so the pre-activation may be overwritten even under autograd (torch refuses
# that for a negative slope or alpha, from which the sign of z cannot be told).
_IN_PLACE_FROM_RESULT: dict[str, Callable[..., Tensor]] = {
    "relu": torch.relu_,
    "relu6": _nn.relu6_,
    "leaky_relu": F.leaky_relu_,
    "elu": F.elu_,
    "selu": torch.selu_,
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
}

_IN_PLACE: dict[str, Callable[..., Tensor]] = {
    **_IN_PLACE_FROM_RESULT,
    "gelu": _nn.gelu_,
    "gelu_tanh": functools.partial(_nn.gelu_, approximate="tanh"),
    "silu": _nn.silu_,
    "mish": _nn.mish_,
    "hardswish": _nn.hardswish_,
    "hardsigmoid": _nn.hardsigmoid_,
}


def of_type(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor itself where it can be: to ask for its own type takes a while, and makes another under a transform."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def activate(z: Tensor, activation: Activation | None) -> Tensor:
    """activation(z), z left as it is."""
    if activation is None:
        return z
    return _OUT_OF_PLACE[activation.name](z, **activation.parameters)


def _in_place(activation: Activation, learns: bool) -> Callable[[Tensor], Tensor]:
    """The activation of a tensor that may be overwritten, as far as autograd allows it where something learns."""
    table = _IN_PLACE
    if learns:
        table = _IN_PLACE_FROM_RESULT if min(activation.scalars) >= 0 else {}
    function = table.get(activation.name, _OUT_OF_PLACE[activation.name])
    return functools.partial(function, **activation.parameters) if activation.parameters else function


def dropout(x: Tensor, p: float) -> Tensor:
    """x as torch's dropout leaves it in training; x itself where nothing is dropped."""
    return F.dropout(x, p) if p > 0.0 else x


def finish(normalized: Tensor, residual: Tensor | None, activation: Activation | None) -> Tensor:
    """activation(normalized + residual); `normalized` is a tensor of this call's own that nothing has saved."""
    return plan_finish(normalized, residual, activation)(normalized, residual)


def plan_finish(
    normalized: Tensor, residual: Tensor | None, activation: Activation | None
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """`finish` of tensors like these, as a function of both."""
    # A compiler makes every operation out of place and fuses it anyway, torch.jit.trace wants the same ones with and
    # without autograd; a tensor subclass may want to be the result.
    if _looked_into() or type(residual) not in PLAIN:
        return lambda normalized, residual: activate(
            normalized if residual is None else normalized + residual, activation
        )
    act = None
    if activation is not None:
        learns = normalized.requires_grad or (residual is not None and residual.requires_grad)
        act = _in_place(activation, learns and torch.is_grad_enabled())
    if residual is None:
        return lambda normalized, _: normalized if act is None else act(normalized)
    return lambda normalized, residual: (
        normalized.add_(residual) if act is None else act(normalized.add_(residual))  # type: ignore[arg-type]
    )


def at_first(plan: Callable[..., Callable[..., Any]]) -> Callable[..., Any]:
    """What `plan` decides of the arguments of the first call, for this and all others, which are to be like it."""
    decided: Callable[..., Any] | None = None

    def run(*arguments: Any) -> Any:
        nonlocal decided
        if decided is None:
            decided = plan(*arguments)
        return decided(*arguments)

    return run


def _probe_rms_eps(dtype: torch.dtype) -> float:
    """What the installed torch's rms_norm takes for eps=None: the epsilon of the type it computes in, or of x's type.

    Releases differ, so it is asked: of 2**-12 it makes 2**-12 / sqrt(2**-24 + eps).
    """
    x = torch.full((1,), 2.0**-12, dtype=dtype, device="cpu")
    implied = (2.0**-12 / F.rms_norm(x, (1,)).item()) ** 2 - 2.0**-24
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    return min(torch.finfo(dtype).eps, torch.finfo(accumulated).eps, key=lambda eps: abs(eps - implied))


DEFAULT_RMS_EPS = {dtype: _probe_rms_eps(dtype) for dtype in FLOATING}


def _common_dtype(x: Tensor, *parameters: Tensor | None) -> torch.dtype:
    """x's type where every parameter has it, otherwise the type that holds them all."""
    dtype = x.dtype
    for parameter in parameters:
        if parameter is not None and parameter.dtype != dtype:
            dtype = torch.promote_types(torch.promote_types(dtype, parameter.dtype), torch.float32)
    return dtype


def but_channels(x: Tensor) -> list[int]:
    """The dimensions over which a channel's elements lie."""
    return [dim for dim in range(x.dim()) if dim != 1]


def _one_type(dtype: torch.dtype, *tensors: Tensor | None) -> bool:
    return all(tensor is None or tensor.dtype == dtype for tensor in tensors)


def _all_float32(weight: Tensor | None, bias: Tensor | None) -> bool:
    return weight is not None and _one_type(torch.float32, weight, bias)


def layer_norm(
    x: Tensor, shape: Shape, weight: Tensor | None, bias: Tensor | None, eps: float, subtract_mean: bool = True
) -> Tensor:
    """torch's layer_norm, or rms_norm (and a bias) without subtract_mean, in x's type whatever the parameters' is."""
    if subtract_mean and x.dtype in HALF and x.device.type == "cpu" and _all_float32(weight, bias):
        return F.layer_norm(x, shape, weight, bias, eps)  # the one mixture that torch takes, on a CPU
    dtype = _common_dtype(x, weight, bias)
    if not _one_type(dtype, x, weight, bias):
        # torch refuses some mixtures and takes a slow path for others.
        weight, bias = (None if parameter is None else parameter.to(dtype) for parameter in (weight, bias))
        return layer_norm(x.to(dtype), shape, weight, bias, eps, subtract_mean).to(x.dtype)
    if subtract_mean:
        return F.layer_norm(x, shape, weight, bias, eps)
    y = F.rms_norm(x, shape, weight, eps)
    return y if bias is None else y + bias


def plan_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Shape, eps: float, subtract_mean: bool
) -> Callable[..., Tensor]:
    """`layer_norm` of tensors like these, as a function of them."""
    plain = not _looked_into() and {*map(type, (x, weight, bias))} <= PLAIN and not intercepted()
    if plain and _one_type(x.dtype, weight, bias):
        # Who intercepts functions wants F's; for others they take a microsecond more.
        if subtract_mean:
            return lambda x, weight, bias: torch.layer_norm(x, shape, weight, bias, eps)
        if bias is None:
            return lambda x, weight, bias: torch.rms_norm(x, shape, weight, eps)
    return lambda x, weight, bias: layer_norm(x, shape, weight, bias, eps, subtract_mean)


def _laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """y in x's layout (channels_last, or any other order of the dims), as torch.empty_like understands it."""
    if y.stride() == x.stride() or transformed():
        return y
    like = torch.empty_like(x, dtype=y.dtype, device="meta")
    if all(a == b or size == 1 for a, b, size in zip(y.stride(), like.stride(), y.shape, strict=True)):
        return y
    return y.new_empty_strided(y.shape, like.stride()).copy_(y)  # of y's own class


def _is_ours_alone(*tensors: Tensor | None) -> bool:
    """Whether the first of these, a new tensor, may be overwritten: nobody learns, traces or transforms."""
    if _looked_into():
        return False
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return False
    return {*map(type, tensors)} <= PLAIN


def differentiable_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, subtract_mean: bool
) -> Tensor:
    """The norm over the last dim in elementary operations, in the type that kernels compute in.

    Any derivative of it is right; of torch's own layer_norm the third is not.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    deviation = x = x.to(dtype)
    if subtract_mean:
        deviation = x - x.mean(-1, keepdim=True)
    y = deviation * torch.rsqrt(deviation.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight.to(dtype)
    return y if bias is None else y + bias.to(dtype)
