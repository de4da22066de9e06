"""What torch eager's chain of a workload takes of a GPU: launches, bytes they move, bytes kept for backward.

The chain is dispatched at its full size on meta tensors, which have no data, so nothing runs. An op that computes is
one launch, which reads each distinct tensor that it is given and writes each that it returns; KERNELS has the ops that
CUDA runs as more. A kernel that walks a row twice is charged for one walk, so the bytes are the fewest that the chain
can move. Fake CUDA tensors would be nearer, but their gradients need a GPU's driver. Two things differ:

- rms_norm is one fused op on CUDA since torch 2.9, and a dozen ops elsewhere: `_OnCuda` puts the fused one in place.
- autograd adds up the gradients of a tensor that is used twice in place where it can, out of place under a dispatch
  mode: one launch that reads two tensors and writes one either way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as TF
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_ops.kernels.launch import H200

from ..memory import kept_bytes, storage_id
from ..records import Counts
from ..traffic import Direction
from ..workloads import Workload
from .calls import run

Tensor = torch.Tensor
aten = torch.ops.aten


def count(workload: Workload, dtype: torch.dtype, direction: Direction) -> Counts:
    """Of one call at the full size."""
    chain, counter = workload.torch_composition(), _Counter()
    case = workload.case_of(workload.shape("full"), lambda shape, *_: torch.empty(shape, dtype=dtype, device="meta"))
    with _OnCuda():
        with counter:
            run(chain, case, direction)
        kept = kept_bytes(chain, case) if direction == "forward+backward" else None
    return Counts(len(counter.launches), sum(launch.moved_bytes for launch in counter.launches), kept)


@dataclass(frozen=True)
class Launch:
    """The tensors that one launch reads and writes."""

    read: Sequence[Tensor]
    written: Sequence[Tensor]

    @property
    def moved_bytes(self) -> int:
        """A tensor that is given twice is read once; one that is changed in place is read and written."""
        return sum(_distinct_bytes(self.read)) + sum(_distinct_bytes(self.written))


def _distinct_bytes(tensors: Sequence[Tensor]) -> Iterator[int]:
    """Bytes of each distinct tensor; along a dimension that is expanded it has but one element."""
    distinct = {(storage_id(one), one.storage_offset(), one.shape, one.stride()): one for one in tensors}
    for tensor in distinct.values():
        sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        yield math.prod(sizes) * tensor.itemsize


class _Counter(TorchDispatchMode):
    """Notes what every op launches; `launches` fills."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        results = op(*args, **(kwargs or {}))
        if op.overloadpacket in KERNELS:
            self.launches += KERNELS[op.overloadpacket](results, *args)
        elif not op.is_view and op.overloadpacket not in ALLOCATES:
            self.launches.append(Launch(_tensors((args, kwargs)), _tensors(results)))
        return results


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


# --- what CUDA runs as several kernels -----------------------------------------------------------------------------

# Take memory, and leave in it what was there.
ALLOCATES = frozenset({aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided})


def _norm(results: Sequence[Tensor], x: Tensor, _shape: Sequence[int], *parameters_and_eps: Any) -> Iterator[Launch]:
    """One kernel; two, each of which reads x, where vectors of four elements do not fit the rows or the type."""
    y, *statistics = results
    parameters = _tensors(parameters_and_eps)
    if x.shape[-1] % 4 == 0 and x.dtype != torch.float64:
        yield Launch([x, *parameters], results)
    else:
        yield Launch([x], statistics)
        yield Launch([x, *statistics, *parameters], [y])


def _layer_norm_backward(
    results: Sequence[Tensor], dy: Tensor, x: Tensor, _: Any, mean: Tensor, rstd: Tensor, weight: Tensor, *_rest: Any
) -> Iterator[Launch]:
    return _norm_backward(results, [dy, x, mean, rstd], weight)


def _rms_norm_backward(
    results: Sequence[Tensor], dy: Tensor, x: Tensor, _: Any, rstd: Tensor, weight: Tensor, *_rest: Any
) -> Iterator[Launch]:
    return _norm_backward(results, [dy, x, rstd], weight)


def _norm_backward(results: Sequence[Tensor], read: Sequence[Tensor], weight: Tensor) -> Iterator[Launch]:
    """dx; then the gradients of the parameters in a kernel that reads x and dy again.

    Of many short rows that kernel writes the sums of blocks of rows, which one launch a parameter then adds up.
    """
    dx, *gradients = results
    yield Launch([*read, weight], [dx])
    rows, span = dx.numel() // dx.shape[-1], dx.shape[-1]
    if rows <= 64 * 1024 or span // 32 >= H200.multiprocessors // 2:
        yield Launch(read, gradients)
        return
    blocks = min(32 * 1024 // -(-span // 32), -(-rows // 32))
    sums = [gradient.new_empty((blocks, span)) for gradient in gradients]
    yield Launch(read, sums)
    for of_blocks, gradient in zip(sums, gradients, strict=True):
        yield Launch([of_blocks], [gradient])


def _group_norm(
    results: Sequence[Tensor], x: Tensor, weight: Tensor, bias: Tensor, samples: int, channels: int, *_: Any
) -> Iterator[Launch]:
    """The moments of each group; a factor and a summand for each channel of each sample; y of these."""
    y, mean, rstd = results
    factors = [mean.new_empty((samples, channels)) for _ in range(2)]
    yield Launch([x], [mean, rstd])
    yield Launch([mean, rstd, weight, bias], factors)
    yield Launch([x, *factors], [y])


def _group_norm_backward(
    results: Sequence[Tensor], dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, *sizes: Any
) -> Iterator[Launch]:
    """Two sums over each plane; three factors of dx; dx; the gradients of the parameters from the sums."""
    samples, channels, _, groups, _ = sizes
    dx, *gradients = results
    sums = [mean.new_empty((samples, channels)) for _ in range(2)]
    of_channels, of_groups = (
        mean.new_empty((samples, channels)),
        [mean.new_empty((samples, groups)) for _ in range(2)],
    )
    yield Launch([dy, x], sums)
    yield Launch([rstd, weight], [of_channels])
    yield Launch([mean, rstd, weight, *sums], of_groups)
    yield Launch([dy, x, of_channels, *of_groups], [dx])
    yield Launch([mean, rstd, *sums], gradients)


def _batch_norm(
    results: Sequence[Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    *_: Any,
) -> Iterator[Launch]:
    """The moments of each channel; running statistics moved towards them; y of these, or of running statistics."""
    y, *statistics = results
    running = _tensors((running_mean, running_var))
    if not training:
        yield Launch([x, weight, bias, *running], [y])
        return
    yield Launch([x], statistics)
    if running:
        yield Launch([*statistics, *running], running)
    yield Launch([x, weight, bias, *statistics], [y])


def _batch_norm_backward(
    results: Sequence[Tensor], dy: Tensor, x: Tensor, weight: Tensor, _mean: Any, _var: Any, *rest: Any
) -> Iterator[Launch]:
    """One kernel, which walks each channel twice."""
    yield Launch([dy, x, weight, *_tensors(rest)], results)


# From aten/src/ATen/native/cuda/ of torch: group_norm_kernel.cu, Normalization.cuh for batch norm, which instance norm
# calls, and layer_norm_kernel.cu, whose kernels RMSNorm shares:
# LayerNormKernelImplInternal, LayerNormBackwardKernelImplInternal and, for the parameters,
# LaunchGammaBetaBackwardCUDAKernel. Each takes the results and the arguments of its op; all gradients are asked for.
KERNELS: Mapping[Any, Callable[..., Iterator[Launch]]] = {
    aten.native_layer_norm: _norm,
    aten._fused_rms_norm: _norm,
    aten.native_layer_norm_backward: _layer_norm_backward,
    aten._fused_rms_norm_backward: _rms_norm_backward,
    aten.native_group_norm: _group_norm,
    aten.native_group_norm_backward: _group_norm_backward,
    aten.native_batch_norm: _batch_norm,
    aten.native_batch_norm_backward: _batch_norm_backward,
}


# --- rms_norm as CUDA has it ---------------------------------------------------------------------------------------


class _OnCuda(TorchFunctionMode):
    """torch.rms_norm inside is the fused op, whatever the device."""

    def __torch_function__(self, called: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        function = _fused_rms_norm if called in (torch.rms_norm, TF.rms_norm) else called
        return function(*args, **(kwargs or {}))


def _fused_rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float) -> Any:
    return _FusedRMSNorm.apply(x, shape, weight, eps)


class _FusedRMSNorm(torch.autograd.Function):
    """Saves what torch's derivative of the op does. Below autograd it reaches a dispatch mode in one piece."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y, rstd = aten._fused_rms_norm(x, shape, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.shape = shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        with torch._C._AutoDispatchBelowAutograd():
            dx, dweight = aten._fused_rms_norm_backward(dy, x, ctx.shape, rstd, weight, [True, True])
        return dx, None, dweight, None
