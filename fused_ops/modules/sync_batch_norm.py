"""SyncBatchNorm and AddSyncBatchNorm, and the conversion of a model to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ..distributed import add_sync_batch_norm, sync_batch_norm
from .base import Activated, Added
from .batch_norm import Batches


class _Synchronized(Batches, nn.SyncBatchNorm):
    """What torch.nn's SyncBatchNorm checks before a call, and when it synchronizes; not on which devices."""

    _fused_norm, _fused_add_norm = staticmethod(sync_batch_norm), staticmethod(add_sync_batch_norm)

    def _check_input_dim(self, input: Tensor) -> None:
        super()._check_input_dim(input)
        self._check_non_zero_input_channels(input)

    def _group(self) -> Any:
        """The processes that share statistics, None where this one has its own or running ones."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self.process_group is None else self.process_group
        return group if dist.get_world_size(group) > 1 else None

    def _call_fused(self, function: Callable[..., Any], *inputs: Tensor, **keywords: Any) -> Any:
        return super()._call_fused(function, *inputs, group=self._group(), **keywords)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """The function of that name, which keeps activations, in the place of torch's."""
        return convert_sync_batchnorm(module, process_group)


class SyncBatchNorm(Activated, _Synchronized):
    """torch.nn.SyncBatchNorm with `residual` and `activation` in the same call, on CPUs with gloo as well.

    .. math:: y = \\mathrm{activation}(\\mathrm{norm}(x) + \\mathrm{residual})

    x, and a residual like it, has shape ``(N, C, *)``. In training mean and variance are those of each channel over the
    batches of all processes of `process_group` (None: of all there are), which may differ in size and be empty; in
    eval(), without an initialized process group and alone in one it is a plain batch norm. Same constructor, state_dict
    and running statistics as torch's, and the keyword `activation`; types as in `functional.batch_norm`. Every process
    of the group has to make each call, and its backward (see `fused_ops.distributed`). Gradients of weight and bias are
    those of its own batch, for DistributedDataParallel to average, which on a CPU refuses models with such a norm:
    there average them yourself. No gradient can be differentiated again, and torch.compile leaves the call alone.

    Raises:
        ArgumentError (a ValueError and a RuntimeError): as in `functional.batch_norm`; one value a channel in all
            processes together. An error of one process alone leaves the others waiting.

    Example:
        >>> norm = SyncBatchNorm(64, activation="relu")
        >>> y = norm(torch.randn(2, 64, 16, 16), residual=torch.randn(2, 64, 16, 16))
    """


class AddSyncBatchNorm(Added, _Synchronized):
    """``total = residual + dropout(x), y = activation(norm(total))``, synchronized; returns ``(y, total)``.

    Same constructor and state_dict as torch.nn.SyncBatchNorm, and the keywords `activation` and `dropout_p` (see
    `functional.add_batch_norm`).
    """


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Replaces every batch norm of a model, ours and torch.nn's, by a SyncBatchNorm with its parameters and buffers.

    Activations are kept, and calls with a residual work as before; of an AddBatchNorm an AddSyncBatchNorm is made. As
    with torch's conversion a new norm has none of the old one's hooks. A norm in several places stays one.

    Args:
        module: the model, or a batch norm itself.
        process_group: whose statistics are shared; None: those of all processes.

    Returns:
        The module, its norms replaced, or what replaces a module that is a batch norm itself.

    Raises:
        ValueError: a lazy batch norm that has not seen an input.

    Example:
        >>> model = convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    """
    return _converted(module, process_group, {})


def _converted(module: nn.Module, process_group: Any, known: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in known:
        known[module] = _synchronized(module, process_group) if isinstance(module, _BatchNorm) else module
        for name, child in module._modules.items():
            if child is not None:
                known[module].add_module(name, _converted(child, process_group, known))
    return known[module]


def _synchronized(norm: _BatchNorm, process_group: Any) -> nn.Module:
    if any(tensor is not None and is_lazy(tensor) for tensor in (norm.weight, norm.running_mean)):
        name = type(norm).__name__
        raise ValueError(f"convert_sync_batchnorm: {name} does not know its number of channels yet; run the model once")
    keywords: dict[str, Any] = {"device": "meta"}  # its own parameters and buffers are not kept
    if isinstance(norm, Activated):
        keywords["activation"] = norm.activation
    if isinstance(norm, Added):
        keywords["dropout_p"] = norm.dropout_p
    if norm.affine and norm._parameters["bias"] is None:
        keywords["bias"] = False
    cls = AddSyncBatchNorm if isinstance(norm, Added) else SyncBatchNorm
    made = cls(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, process_group, **keywords
    )
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(made, name, getattr(norm, name))
    made.training = norm.training
    if hasattr(norm, "qconfig"):
        made.qconfig = norm.qconfig
    return made
