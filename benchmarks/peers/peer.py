"""What a contender is, and how one of another library is made from its calls."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..workloads import Call, Tensor, Workload, finish

Build = Callable[[Workload], Call]


@dataclass(frozen=True)
class Peer:
    """build: its call of a workload. gap: why it cannot run one on a kind of device, empty where it can. compiles: a
    default run leaves it out where a CPU takes long to; only_full: every default run does."""

    name: str
    build: Build
    gap: Callable[[Workload, str], str] = lambda workload, device: ""
    compiles: bool = False
    only_full: bool = False


def library_peer(
    name: str,
    module: str,
    calls: Mapping[str, Build],
    reasons: Mapping[str, str] | None = None,
    refusal: Callable[[Workload], str] = lambda workload: "",
) -> Peer:
    """A library of GPU kernels, by its call of each of our functions that it has. reasons: why it has none of another
    that it seems to have; refusal: why its call does not take a workload."""

    def gap(workload: Workload, device: str) -> str:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        if device != "cuda":
            return f"{name}'s kernels need a GPU"
        if workload.function in calls:
            return refusal(workload)
        return (reasons or {}).get(workload.function, f"{name} has no {workload.function}")

    return Peer(name, lambda workload: calls[workload.function](workload), gap)


def finishing(workload: Workload, norm: Callable[..., Tensor]) -> Call:
    """The call of a norm(x, weight, bias), the add and the activation behind it in torch."""

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        return finish(norm(x, weight, bias), residual, workload.activation)

    return call


@dataclass(frozen=True)
class KernelPair:
    """A norm that its library offers as two functions without autograd.

    forward(x, weight, bias) returns y, mean (None of an RMS norm) and rstd; backward(dy, x, mean, rstd, weight, bias,
    needed) the gradients of x, weight and bias, needed being which of them are.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor | None, ...]]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = _Pair.apply(self, x, weight, bias)
        return y

    def of_rows(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """For a library that takes matrices alone."""
        return self(x.reshape(-1, x.shape[-1]), weight, bias).reshape(x.shape)


class _Pair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pair: KernelPair, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y, mean, rstd = pair.forward(x, weight, bias)
        ctx.pair = pair
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, *dy: Any) -> Any:
        return None, *ctx.pair.backward(*dy, *ctx.saved_tensors, ctx.needs_input_grad[1:])
