"""A case as a function of its tensors: what autograd, compilers and transforms are given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from tests.norm_cases import DEVICE, OPERANDS, Case, torch_expression

Tensor = torch.Tensor
Outputs = tuple[Tensor, ...]
Function = Callable[..., Outputs]


def operands(case: Case) -> dict[str, Tensor]:
    """New leaves for one run, by name: x, residual, weight, bias, as far as the case has them."""
    leaves = case.leaves()
    return {
        name: leaf.detach().to(DEVICE, copy=True).requires_grad_(leaf.requires_grad) for name, leaf in leaves.items()
    }


def given(case: Case) -> tuple[str, ...]:
    return tuple(name for name in OPERANDS if getattr(case, name) is not None)


def fused(case: Case) -> Function:
    """The call of fused_ops.functional as a function of `operands(case).values()` that always returns a tuple."""
    names = given(case)

    def function(*tensors: Tensor) -> Outputs:
        return as_tuple(case.call(dict(zip(names, tensors, strict=True))))

    return function


def composed(case: Case) -> Function:
    """The same call as torch.nn.functional alone makes it."""
    names = given(case)

    def function(*tensors: Tensor) -> Outputs:
        return as_tuple(torch_expression(case, dict(zip(names, tensors, strict=True))))

    return function


def as_tuple(outputs: Tensor | Outputs) -> Outputs:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def scalar(outputs: Outputs) -> Tensor:
    """A number in which every element of every output counts, each differently and none linearly."""
    loss = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for output in outputs:
        index = torch.arange(output.numel(), dtype=torch.float64, device=output.device)
        loss = loss + (output.double().sin() * (1.5 + index.cos()).view(output.shape)).sum()
    return loss


def gradients(function: Function, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """d scalar(function) / d tensor of every tensor that requires it."""
    wanted = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
    found = torch.autograd.grad(scalar(function(*tensors.values())), list(wanted.values()))
    return dict(zip(wanted, found, strict=True))


@contextlib.contextmanager
def recorded() -> Iterator[list[Tensor]]:
    """Collects the tensors that autograd keeps meanwhile."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
