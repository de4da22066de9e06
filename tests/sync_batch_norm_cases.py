"""Cases of synchronized batch norm: what each process is given, and what one makes of it all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import fused_ops
from tests.norm_cases import normal, torch_activate

Tensor = torch.Tensor
MOMENTUM = 0.3


@dataclass(frozen=True)
class Case:
    """One step of a module. batches: how many samples each process has, of the first so many processes; frozen:
    processes whose x requires no gradient."""

    name: str
    batches: tuple[int, ...] = (3, 1, 2)
    shape: tuple[int, ...] = (5, 3, 4)
    activation: Any = None
    residual: bool = False
    add_first: bool = False
    dtype: torch.dtype = torch.float32
    parameters: torch.dtype | None = None
    residual_dtype: torch.dtype | None = None
    channels_last: bool = False
    scale: float = 1.0
    mean: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[int, ...] = ()
    steps: int = 1

    def of_whole(self, world: int, step: int = 0) -> tuple[Tensor, Tensor | None]:
        """(x, residual) of all processes together."""
        shape = (sum(self.batches[:world]), *self.shape)
        x = (normal(*shape, dtype=torch.float64, seed=2 * step) * self.scale + self.mean).to(self.dtype)
        residual = None
        if self.residual or self.add_first:
            residual = normal(*shape, dtype=self.residual_dtype or self.dtype, seed=2 * step + 1)
        if self.channels_last:
            x, residual = laid_out(x), None if residual is None else laid_out(residual)
        return x, residual

    def of_process(self, tensor: Tensor | None, rank: int) -> Tensor | None:
        """The part of a tensor of all that one process has, a leaf."""
        if tensor is None:
            return None
        first = sum(self.batches[:rank])
        return tensor[first : first + self.batches[rank]].clone()

    def module(self) -> Any:
        cls = fused_ops.AddSyncBatchNorm if self.add_first else fused_ops.SyncBatchNorm
        options = {"momentum": MOMENTUM, "dtype": self.parameters or self.dtype, **self.options}
        return with_values(cls(self.shape[0], activation=self.activation, **options))

    def torchs_module(self, dtype: torch.dtype) -> nn.Module:
        return with_values(OfAnyShape(self.shape[0], **{"momentum": MOMENTUM, "dtype": dtype, **self.options}))


def laid_out(tensor: Tensor) -> Tensor:
    """In channels_last, of any number of dims."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


class OfAnyShape(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        pass


def with_values(module: Any) -> Any:
    """Parameters and running statistics that are no ones and zeros."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        for seed, name in enumerate(("weight", "bias", "running_mean", "running_var")):
            if tensors.get(name) is not None:
                values = normal(*tensors[name].shape, dtype=torch.float64, seed=seed + 20)
                tensors[name].copy_(values.square() + 0.5 if name == "running_var" else values)
    return module


CASES = [
    Case("plain"),
    Case("relu, residual", activation="relu", residual=True),
    Case("an empty process", batches=(3, 0, 4), activation="relu", residual=True),
    Case("the first is empty", batches=(0, 3, 2), shape=(6,), activation="gelu", residual=True),
    Case("rows, one of one", batches=(1, 4, 1), shape=(7,), activation="silu"),
    Case("positions", batches=(2, 5, 1), shape=(3, 9), activation="gelu"),
    Case("planes that are not short", batches=(2, 1, 1), shape=(2, 17, 17), activation="leaky_relu", residual=True),
    Case("volumes in channels_last", shape=(8, 2, 3, 2), activation="relu", residual=True, channels_last=True),
    Case("channels_last, gelu", shape=(9, 4, 3), activation="gelu", residual=True, channels_last=True),
    Case("half, parameters float32", batches=(4, 2, 3), dtype=torch.float16, parameters=torch.float32, residual=True),
    Case("bfloat16", batches=(4, 2, 3), dtype=torch.bfloat16, parameters=torch.float32, activation="relu"),
    Case("float64", dtype=torch.float64, activation="silu", residual=True),
    Case("no affine", options={"affine": False}, activation="relu", residual=True),
    Case("no bias", options={"bias": False}, activation="gelu"),
    Case("not tracked", options={"track_running_stats": False}),
    Case("a cumulative average", options={"momentum": None}, steps=2, shape=(4, 6)),
    Case("large mean", batches=(40, 13, 70), shape=(3,), mean=1e4, scale=1e-2),
    Case("large mean, planes", batches=(2, 1, 2), shape=(6, 20, 15), mean=1e4, scale=1e-2),
    Case("x frozen in one process", frozen=(0,), activation="relu", residual=True),
    Case("x frozen in the others", frozen=(1, 2), batches=(2, 0, 3)),
    Case("add first", add_first=True, activation="relu"),
    Case("add first, an empty process", add_first=True, batches=(0, 5, 3), shape=(6,), activation="gelu"),
    Case(
        "add first, float32 residual", add_first=True, dtype=torch.float16, parameters=torch.float32,
        residual_dtype=torch.float32, channels_last=True, activation="relu",
    ),
]  # fmt: skip


def gradients_of_whole(case: Case, world: int, step: int, outputs: int) -> tuple[Tensor, ...]:
    """What arrives at y, and at the total."""
    shape = (sum(case.batches[:world]), *case.shape)
    types = (case.dtype, case.residual_dtype or case.dtype)
    return tuple(normal(*shape, dtype=types[i], seed=100 + 2 * step + i) for i in range(outputs))


def one_process(case: Case, world: int, exact: bool) -> dict[str, Tensor]:
    """What torch makes of the whole batch, in float64 or in the case's own types."""
    wide = torch.float64 if exact else None
    norm = case.torchs_module(wide or case.parameters or case.dtype)
    found: dict[str, Tensor | None] = {}
    for step in range(case.steps):
        x, residual = (
            None if tensor is None else tensor.to(wide or tensor.dtype).requires_grad_()
            for tensor in case.of_whole(world, step)
        )
        total = residual + x if case.add_first else None
        z = norm(x if total is None else total)
        if residual is not None and total is None:
            z = z + residual
        y = torch_activate(z, case.activation).to(wide or case.dtype)
        outputs = [y] if total is None else [y, total]
        arriving = gradients_of_whole(case, world, step, len(outputs))
        norm.zero_grad()
        torch.autograd.backward(outputs, [g.to(out.dtype) for g, out in zip(arriving, outputs, strict=True)])
        found = {"y": y, "total": total, "dx": x.grad, "dresidual": None if residual is None else residual.grad}
    found |= {f"d{name}": parameter.grad for name, parameter in norm.named_parameters()}
    found |= dict(norm.named_buffers())
    return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}
