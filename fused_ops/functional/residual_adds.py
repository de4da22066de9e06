"""The residual add: the identity path, with what a block does to its branch and to the sum."""

from __future__ import annotations

import torch

from .. import backend, known, residual_fallback, validation
from ..activation import Activation, ActivationLike, resolve
from .dispatch import _fused, _kernels

if backend.HAS_TRITON:
    from .. import drops, planned, residual_autograd, residual_ops
    from ..kernels.problem import ResidualAdd

Tensor = torch.Tensor

_MOST_CHANNELS = 2**31 - 1


def residual_add(
    x: Tensor,
    residual: Tensor,
    *,
    activation: ActivationLike = None,
    scale: Tensor | None = None,
    dropout_p: float = 0.0,
    drop_path_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """Adds a block's branch to the residual stream, the branch dropped out and scaled: one pass over memory.

    .. math:: y = \\mathrm{activation}(\\mathrm{residual} + \\mathrm{drop\\_path}(\\mathrm{scale} \\cdot
              \\mathrm{dropout}(x)))

    Dropout drops elements, drop-path samples (what shares an index of the first dim), and both multiply what they keep
    by 1 / (1 - p). What they drop follows from torch's generator of x's device, which `torch.manual_seed` governs, and
    is drawn again in backward: no mask is kept.

    Args:
        x: the branch, any shape, float16, bfloat16, float32 or float64, any strides.
        residual: the stream, x's shape and device, and its type, or float32 with half or bfloat16 x.
        activation: as in `layer_norm`; after the sum.
        scale: what the branch is multiplied by, a tensor of any of the types that broadcasts to x: (C,) where channels
            are the last dim, (C, 1, 1) in an image.
        dropout_p, drop_path_p: probabilities in [0, 1]; 0 unless `training`.

    Returns:
        y, with x's shape and layout in memory and the residual's type. In the kernels all arithmetic is float32 (or
        float64, as x), and y is rounded once. torch's composition rounds as eager torch does: where x and the residual
        are both half or bfloat16, each product and the sum; beside a float32 residual all of it is float32.

    Raises:
        ArgumentError (a ValueError and a RuntimeError): a shape, device, type or rate that does not fit.
        ValueError: an unknown activation.

    He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", arXiv:1603.05027; Huang et al., "Deep Networks
    with Stochastic Depth", arXiv:1603.09382; Touvron et al., "Going Deeper with Image Transformers", arXiv:2103.17239.

    Example:
        >>> x, stream = torch.randn(8, 16), torch.randn(8, 16)
        >>> residual_add(x, stream, scale=torch.full((16,), 0.1), drop_path_p=0.2).shape
        torch.Size([8, 16])
    """
    function = "residual_add"
    rates = (
        validation.rate(function, "dropout_p", dropout_p),
        validation.rate(function, "drop_path_p", drop_path_p),
    )
    options = (*rates, bool(training), resolve(activation))
    return known.find(function, _plan_residual_add, options, (x, residual, scale))(x, residual, scale)


def _plan_residual_add(
    function: str,
    x: Tensor,
    residual: Tensor,
    scale: Tensor | None,
    dropout_p: float,
    drop_path_p: float,
    training: bool,
    activation: Activation | None,
) -> known.Call:
    """y of a call, once its arguments are checked, as a function of the three tensors."""
    validation.floating(function, "x", x)
    if residual is None:
        raise validation.ArgumentError(f"{function}: residual must be a tensor, but is None")
    validation.like_input(function, residual, x, may_be_float32=True)
    validation.broadcasts(function, "scale", scale, x)
    validation.samples(function, drop_path_p, x)
    rates = (dropout_p, drop_path_p) if training else (0.0, 0.0)
    plan = _kernels(x, residual, scale) if scale is None or _goes_by_channel(scale, x) else None
    if plan is None:
        return lambda x, residual, scale: residual_fallback.residual_add(x, residual, scale, *rates, activation)
    problem, drops_some = ResidualAdd(*rates, *_fused(activation)), max(rates) > 0.0
    run = (residual_autograd if plan is planned.plan else residual_ops).plan(x, residual, scale, problem)

    def by_kernel(x: Tensor, residual: Tensor, scale: Tensor | None) -> Tensor:
        return run(x, residual, scale, drops.draw_seed(x.device) if drops_some else None)

    return by_kernel


def _goes_by_channel(scale: Tensor, x: Tensor) -> bool:
    """Whether the scale is of one axis of x, or of several with none between them that it lacks, and not longer than
    kernels count channels; any other, a gate of each sample's channels (N, 1, C), is torch's to broadcast."""
    axes = [dim for dim, size in enumerate(scale.shape) if size != 1]
    if len(axes) < 2:
        return True
    between = slice(axes[0], axes[-1] + 1)
    of_x = x.shape[x.dim() - scale.dim() :]
    return scale.shape[between] == of_x[between] and scale.numel() <= _MOST_CHANNELS
