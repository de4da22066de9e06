"""The functions that workloads call: our call and torch's composition of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as TF

from fused_ops import functional as F

from .workload import EPS, Call, Function, Shape, Tensor, Workload

TORCH_ACTIVATIONS: Mapping[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": TF.relu,
    "gelu": TF.gelu,
    "silu": TF.silu,
    "leaky_relu": TF.leaky_relu,
    "hardswish": TF.hardswish,
}


def finish(normalized: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """activation(normalized + residual) in plain torch."""
    return TORCH_ACTIVATIONS[activation](normalized if residual is None else normalized + residual)


def _torch_layer_norm(workload: Workload) -> Call:
    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return finish(TF.layer_norm(x, weight.shape, weight, bias, EPS), residual, workload.activation)

    return call


def _torch_rms_norm(workload: Workload) -> Call:
    def call(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        return finish(TF.rms_norm(x, weight.shape, weight, EPS), residual, workload.activation)

    return call


def _torch_add_layer_norm(workload: Workload) -> Call:
    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return finish(TF.layer_norm(total, weight.shape, weight, bias, EPS), None, workload.activation), total

    return call


def _torch_add_rms_norm(workload: Workload) -> Call:
    def call(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return finish(TF.rms_norm(total, weight.shape, weight, EPS), None, workload.activation), total

    return call


# --- channels ------------------------------------------------------------------------------------------------------


def _of_channels(shape: Shape) -> dict[str, tuple[Shape, float]]:
    return {"weight": (shape[1:2], 1.0), "bias": (shape[1:2], 0.0)}


def _group_norm(workload: Workload) -> Call:
    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return F.group_norm(x, workload.groups, weight, bias, EPS, residual=residual, activation=workload.activation)

    return call


def _torch_group_norm(workload: Workload) -> Call:
    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return finish(TF.group_norm(x, workload.groups, weight, bias, EPS), residual, workload.activation)

    return call


def _add_group_norm(workload: Workload) -> Call:
    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return F.add_group_norm(x, residual, workload.groups, weight, bias, EPS, activation=workload.activation)

    return call


def _torch_add_group_norm(workload: Workload) -> Call:
    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return finish(TF.group_norm(total, workload.groups, weight, bias, EPS), None, workload.activation), total

    return call


def _instance_norm(workload: Workload) -> Call:
    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        own = {"residual": residual, "activation": workload.activation}
        return F.instance_norm(x, weight=weight, bias=bias, eps=EPS, **own)  # type: ignore[arg-type]

    return call


def _torch_instance_norm(workload: Workload) -> Call:
    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return finish(TF.instance_norm(x, weight=weight, bias=bias, eps=EPS), residual, workload.activation)

    return call


def _running(shape: Shape) -> dict[str, tuple[Shape, float]]:
    return {"running_mean": (shape[1:2], 0.0), "running_var": (shape[1:2], 1.0)}


def _batch_norm(workload: Workload) -> Call:
    def call(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        residual: Tensor | None = None,
    ) -> Tensor:
        statistics, own = (running_mean, running_var), {"residual": residual, "activation": workload.activation}
        return F.batch_norm(x, *statistics, weight, bias, workload.training, 0.1, EPS, **own)  # type: ignore[arg-type]

    return call


def _torch_batch_norm(workload: Workload) -> Call:
    def call(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        residual: Tensor | None = None,
    ) -> Tensor:
        y = TF.batch_norm(x, running_mean, running_var, weight, bias, workload.training, 0.1, EPS)
        return finish(y, residual, workload.activation)

    return call


def _add_batch_norm(workload: Workload) -> Call:
    def call(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor
    ) -> tuple[Tensor, Tensor]:
        own = (running_mean, running_var, weight, bias, workload.training, 0.1, EPS)
        return F.add_batch_norm(x, residual, *own, activation=workload.activation)

    return call


def _torch_add_batch_norm(workload: Workload) -> Call:
    def call(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor
    ) -> tuple[Tensor, Tensor]:
        total = residual + x
        y = TF.batch_norm(total, running_mean, running_var, weight, bias, workload.training, 0.1, EPS)
        return finish(y, None, workload.activation), total

    return call


def _mixture(shape: Shape) -> dict[str, tuple[Shape, float]]:
    return {**_of_channels(shape), "mean_weight": ((3,), 1.0), "var_weight": ((3,), 1.0)}


def _switch_norm(workload: Workload) -> Call:
    def call(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean_weight: Tensor,
        var_weight: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        residual: Tensor | None = None,
    ) -> Tensor:
        own = (running_mean, running_var, weight, bias, mean_weight, var_weight, workload.training, 0.1, EPS)
        return F.switch_norm(x, *own, residual=residual, activation=workload.activation)

    return call


def _torch_switch_norm(workload: Workload) -> Call:
    """As the authors' code has it: instance statistics by torch, the others from them; running ones apart."""

    def call(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean_weight: Tensor,
        var_weight: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        residual: Tensor | None = None,
    ) -> Tensor:
        positions = tuple(range(2, x.dim()))
        var, mean = torch.var_mean(x, positions, correction=0, keepdim=True)
        square = var + mean.square()
        means, variances = [mean], [var]
        for dim in (1, 0):
            means.append(mean.mean(dim, keepdim=True))
            variances.append(square.mean(dim, keepdim=True) - means[-1].square())
        with torch.no_grad():
            running_mean.lerp_(means[-1].flatten(), 0.1)
            running_var.lerp_(variances[-1].flatten(), 0.1)
        mean_shares, var_shares = mean_weight.softmax(0), var_weight.softmax(0)
        mixed_mean = sum(share * each for share, each in zip(mean_shares, means, strict=True))
        mixed_var = sum(share * each for share, each in zip(var_shares, variances, strict=True))
        by_channel = (-1, *(1,) * len(positions))
        y = (x - mixed_mean) / torch.sqrt(mixed_var + EPS) * weight.view(by_channel) + bias.view(by_channel)
        return finish(y, residual, workload.activation)

    return call


def _weight_standardize(workload: Workload) -> Call:
    return lambda x: F.weight_standardize(x, EPS)


def _torch_weight_standardize(workload: Workload) -> Call:
    def call(x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=tuple(range(1, x.dim())), keepdim=True, correction=0)
        return (x - mean) / torch.sqrt(variance + EPS)

    return call


def _residual_add(workload: Workload) -> Call:
    def call(x: Tensor, residual: Tensor, scale: Tensor | None = None) -> Tensor:
        return F.residual_add(x, residual, scale=scale, activation=workload.activation)

    return call


def _torch_residual_add(workload: Workload) -> Call:
    def call(x: Tensor, residual: Tensor, scale: Tensor | None = None) -> Tensor:
        return finish(x if scale is None else x * scale, residual, workload.activation)

    return call


FUNCTIONS: Mapping[str, Function] = {
    "layer_norm": Function(
        lambda shape: {"weight": (shape[-1:], 1.0), "bias": (shape[-1:], 0.0)},
        lambda workload: (
            lambda x, weight, bias, residual=None: F.layer_norm(
                x, weight.shape, weight, bias, EPS, residual=residual, activation=workload.activation
            )
        ),
        _torch_layer_norm,
    ),
    "rms_norm": Function(
        lambda shape: {"weight": (shape[-1:], 1.0)},
        lambda workload: (
            lambda x, weight, residual=None: F.rms_norm(
                x, weight.shape, weight, EPS, residual=residual, activation=workload.activation
            )
        ),
        _torch_rms_norm,
    ),
    "add_layer_norm": Function(
        lambda shape: {"weight": (shape[-1:], 1.0), "bias": (shape[-1:], 0.0)},
        lambda workload: (
            lambda x, residual, weight, bias: F.add_layer_norm(
                x, residual, weight.shape, weight, bias, EPS, activation=workload.activation
            )
        ),
        _torch_add_layer_norm,
    ),
    "add_rms_norm": Function(
        lambda shape: {"weight": (shape[-1:], 1.0)},
        lambda workload: (
            lambda x, residual, weight: F.add_rms_norm(
                x, residual, weight.shape, weight, EPS, activation=workload.activation
            )
        ),
        _torch_add_rms_norm,
    ),
    "group_norm": Function(_of_channels, _group_norm, _torch_group_norm, over_last_dim=False, by_channel="groups"),
    "add_group_norm": Function(
        _of_channels, _add_group_norm, _torch_add_group_norm, over_last_dim=False, by_channel="groups"
    ),
    "instance_norm": Function(
        _of_channels, _instance_norm, _torch_instance_norm, over_last_dim=False, by_channel="single"
    ),
    "batch_norm": Function(
        _of_channels, _batch_norm, _torch_batch_norm, over_last_dim=False, by_channel="batch", state=_running
    ),
    "add_batch_norm": Function(
        _of_channels, _add_batch_norm, _torch_add_batch_norm, over_last_dim=False, by_channel="batch", state=_running
    ),
    "switch_norm": Function(
        _mixture, _switch_norm, _torch_switch_norm, over_last_dim=False, by_channel="mixed", state=_running
    ),
    "residual_add": Function(lambda shape: {}, _residual_add, _torch_residual_add, norm=False),
    "residual_add_layer_scale": Function(
        lambda shape: {"scale": (shape[-1:], 0.1)}, _residual_add, _torch_residual_add, norm=False
    ),
    "residual_add_channel_scale": Function(
        lambda shape: {"scale": ((shape[1], *(1,) * (len(shape) - 2)), 0.1)},
        _residual_add,
        _torch_residual_add,
        over_last_dim=False,
        norm=False,
    ),
    "weight_standardize": Function(
        lambda shape: {}, _weight_standardize, _torch_weight_standardize, over_last_dim=False
    ),
}
