"""What a workload is: a call of fused_ops at a size somebody uses, its inputs, and torch's composition in its place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

Tensor = torch.Tensor
Shape = tuple[int, ...]
Size = Literal["full", "reduced", "tiny"]
Call = Callable[..., "Tensor | tuple[Tensor, ...]"]  # takes the inputs as keyword arguments

EPS = 1e-5  # torch's for LayerNorm, and Llama 3's for RMSNorm, whose default differs between releases of torch


@dataclass(frozen=True)
class Case:
    """The tensors of one workload at one size and type; all inputs require a gradient, each output is given one.

    state: what the call also takes, and may change.
    """

    inputs: dict[str, Tensor]
    parameters: frozenset[str]  # those inputs that belong to the model rather than to the call
    output_gradients: tuple[Tensor, ...]
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def arguments(self) -> dict[str, Tensor]:
        """Everything that the call takes."""
        return {**self.inputs, **self.state}

    def on_new_leaves(self) -> Case:
        """The same tensors, but for inputs that autograd has not seen yet.

        It remembers the stream that an input was first used on, for as long as anything holds a graph with it, and
        would wait for that stream within a capture, which ends one with an error.
        """
        inputs = {name: tensor.detach().requires_grad_() for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs)

    def copy(self) -> Case:
        """The same values elsewhere in memory, laid out as they are."""
        inputs = {name: tensor.detach().clone().requires_grad_() for name, tensor in self.inputs.items()}
        state = {name: tensor.clone() for name, tensor in self.state.items()}
        return Case(inputs, self.parameters, tuple(gradient.clone() for gradient in self.output_gradients), state)

    @property
    def bytes(self) -> int:
        """What its tensors hold."""
        tensors = (*self.arguments.values(), *self.output_gradients)
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)

    def to(self, dtype: torch.dtype) -> Case:
        """The same values in another type."""
        inputs = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in self.inputs.items()}
        state = {name: tensor.to(dtype, copy=True) for name, tensor in self.state.items()}
        return Case(inputs, self.parameters, tuple(gradient.to(dtype) for gradient in self.output_gradients), state)


@dataclass(frozen=True)
class Shapes:
    """full: for a GPU. reduced: for a CPU, where a call should last milliseconds. tiny: for tests that interpret."""

    full: Shape
    reduced: Shape
    tiny: Shape


@dataclass(frozen=True)
class Workload:
    """A call at a size: `function` of fused_ops.functional, with a residual and an activation or without.

    groups: of channels, of a group norm. training: of a batch norm, by the batch's statistics and not by running ones.
    channels_last: how x and its like lie in memory. launch_bound: so small that the call, not the memory, is what takes
    time. fits_cache: of a model's layer that is no larger. in_default_run: otherwise only --full has it.
    compiled_on_cpu: the default run on a CPU compiles it too, at some 20 s a workload. series: the curve over sizes
    that it is a point of, and nothing else.
    """

    name: str
    function: str
    shapes: Shapes
    residual: bool = False
    activation: str | None = None
    groups: int = 1
    training: bool = True
    channels_last: bool = False
    launch_bound: bool = False
    fits_cache: bool = False
    in_default_run: bool = True
    compiled_on_cpu: bool = False
    series: str = ""

    @property
    def of(self) -> Function:
        """What is known of its function."""
        from .functions import FUNCTIONS

        return FUNCTIONS[self.function]

    def sample(self, shape: Shape) -> Shape:
        """What of a shape belongs to one row, image or filter, which no other has part in."""
        return shape[-1:] if self.of.over_last_dim else shape[1:]

    def of_samples(self, samples: int, size: Size = "full") -> Shape:
        """The shape of an x of so many samples."""
        return (samples, *self.sample(self.shape(size)))

    def samples(self, shape: Shape) -> int:
        """How many of these an x of this shape has."""
        return elements(shape) // elements(self.sample(shape))

    def span(self, shape: Shape) -> int:
        """Elements that share statistics."""
        if self.of.by_channel == "batch":
            return elements(shape) // shape[1]
        if self.of.by_channel == "mixed":  # the longest of the three
            return max(elements(shape) // shape[1], elements(shape[1:]))
        groups = shape[1] if self.of.by_channel == "single" else self.groups
        return elements(self.sample(shape)) // groups

    @property
    def adds_first(self) -> bool:
        """Whether the residual is added before the norm and the sum returned beside y."""
        return self.function.startswith("add_")

    def shape(self, size: Size) -> Shape:
        """The shape of x."""
        shape: Shape = getattr(self.shapes, size)
        return shape

    def case(self, size: Size, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Case:
        """Inputs drawn from a seed: standard normal activations and gradients, weights about 1, biases about 0."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(shape: Shape, deviation: float, mean: float) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device)
            return values.mul_(deviation).add_(mean).to(dtype)

        return self.case_of(self.shape(size), draw)

    def case_of(self, shape: Shape, draw: Callable[[Shape, float, float], Tensor]) -> Case:
        """The tensors of a call on an x of this shape, each from draw(shape, deviation, mean)."""

        def activation() -> Tensor:
            if not self.channels_last:
                return draw(shape, 1.0, 0.0)
            samples, channels, *positions = shape
            return draw((samples, *positions, channels), 1.0, 0.0).movedim(-1, 1)

        has_residual = self.residual or self.adds_first
        inputs = {name: activation() for name in (("x", "residual") if has_residual else ("x",))}
        parameters = self.of.parameters(shape)
        inputs |= {name: draw(own_shape, 0.1, mean) for name, (own_shape, mean) in parameters.items()}
        gradients = tuple(activation() for _ in range(2 if self.adds_first else 1))
        inputs = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        state = {name: draw(own_shape, 0.1, mean).abs() for name, (own_shape, mean) in self.of.state(shape).items()}
        return Case(inputs, frozenset(parameters), gradients, state)

    def ours(self) -> Call:
        """The call of fused_ops."""
        return self.of.ours(self)

    def torch_composition(self) -> Call:
        """What a user of torch writes in its place, every operation out of place."""
        return self.of.torch_composition(self)


@dataclass(frozen=True)
class Function:
    """A function of fused_ops: the shape and mean of each parameter, our call, and torch's composition.

    over_last_dim: its statistics are; otherwise over all but the first, or, by_channel, over groups of channels, single
    ones, these of the whole batch, or all of these mixed. norm: it has any. state: the same of running statistics."""

    parameters: Callable[[Shape], dict[str, tuple[Shape, float]]]
    ours: Callable[[Workload], Call]
    torch_composition: Callable[[Workload], Call]
    over_last_dim: bool = True
    by_channel: Literal["", "groups", "single", "batch", "mixed"] = ""
    state: Callable[[Shape], dict[str, tuple[Shape, float]]] = lambda shape: {}
    norm: bool = True


def elements(shape: Shape) -> int:
    """The number of elements of a shape."""
    return math.prod(shape)
