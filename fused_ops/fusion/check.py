"""Whether a fused model does what the original does, on an example: in evaluation, and in training with gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .sites import Replaced
from .state import Generators, Held, registered

# The largest difference over the largest value that rounding makes of a whole model's results; of gradients ten times.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Results(NamedTuple):
    """What a call of a model returned, its gradients, and what it left in its buffers."""

    outputs: list[Any]
    gradients: list[Any]
    buffers: list[Tensor]


class Example:
    """Inputs of a model: a tuple of positional or a dict of keyword arguments."""

    def __init__(self, given: Any) -> None:
        if not isinstance(given, tuple | dict):
            raise ValueError(
                f"fuse: example_inputs must be a tuple of positional or a dict of keyword arguments, but is a "
                f"{type(given).__name__}; of one tensor x it is (x,)"
            )
        self.given = given

    def call(self, model: nn.Module) -> Any:
        """Calls the model with copies, into which it may write."""
        given = tree_map(_copy, self.given)
        return model(**given) if isinstance(given, dict) else model(*given)

    def results(self, model: nn.Module, training: bool) -> Results:
        """What a call returns in that mode, the model left as it was."""
        with untouched(model), torch.set_grad_enabled(training):
            model.train(training)
            outputs = [leaf for leaf in tree_leaves(self.call(model)) if isinstance(leaf, Tensor)]
            gradients = _gradients(outputs, model) if training else []
            buffers = [buffer.clone() for buffer in model.buffers()]
        return Results([output.detach() for output in outputs], gradients, buffers)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.preserve_format).requires_grad_(value.requires_grad)
    return value


def _gradients(outputs: Sequence[Tensor], model: nn.Module) -> list[Any]:
    """Of a sum of all outputs whose terms all count differently; nothing is added to any `.grad`."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sums = []
    for output in outputs:
        if output.requires_grad and output.numel():
            weight = torch.linspace(-1, 1, output.numel(), device=output.device).cos().view(output.shape)
            sums.append((output * weight).float().mean())
    if not sums or not learning:
        return []
    return list(torch.autograd.grad(torch.stack(sums).sum(), learning, allow_unused=True))


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Leaves modes, buffers, what modules hold besides, and every generator as they were."""
    modes = [(module, module.training) for module in model.modules()]
    held = [(module, registered(module), Held(module)) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    numbers = Generators()
    try:
        with torch.random.fork_rng(devices=[device.index for device in devices]):
            yield
    finally:
        numbers.put_back()
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, before):  # what has not changed may be one element seen many times
                    buffer.copy_(before)
        for module, training in modes:
            module.training = training
        for module, names, fields in held:
            if registered(module) == names:  # else it was built in its first call, which what it holds says
                fields.put_back()


def difference(found: Results, expected: Results) -> str:
    """In what the results differ by more than rounding; nothing where they do not."""
    for what, factor in (("outputs", 1.0), ("buffers", 1.0), ("gradients", 10.0)):
        originals = getattr(expected, what)
        # A gradient that is 0 but for rounding, as a bias's in front of a batch norm, is judged beside the others.
        least = 1e-2 * max(map(_size, originals), default=0.0)
        for ours, original in zip(getattr(found, what), originals, strict=True):
            excess = _excess(ours, original, least)
            if excess > factor:
                return f"its {what} differ by {excess:.1g} times what rounding may make of them"
    return ""


def _size(tensor: Tensor | None) -> float:
    if tensor is None or not tensor.is_floating_point() or tensor.numel() == 0:
        return 0.0
    return tensor.abs().nan_to_num(posinf=0.0).max().item()


def _excess(ours: Tensor | None, original: Tensor | None, least: float) -> float:
    """The largest difference over what is allowed of a tensor of that size, or of the least that counts."""
    if ours is None or original is None:
        return 0.0 if ours is original else float("inf")
    if ours.shape != original.shape or ours.dtype != original.dtype:
        return float("inf")
    if not original.is_floating_point():
        return 0.0 if torch.equal(ours, original) else float("inf")
    differ = ~((ours == original) | (ours.isnan() & original.isnan()))
    if not differ.any():
        return 0.0
    allowed = _TOLERANCE.get(original.dtype, 5e-2) * max(_size(original), least)
    apart = (ours.double() - original.double())[differ].abs().nan_to_num(nan=float("inf")).max().item()
    return apart / max(allowed, 1e-12)


def disagreeing(
    model: nn.Module,
    example: Example,
    expected: dict[bool, Results],
    units: Sequence[Replaced],
    without: Sequence[Replaced] = (),
) -> dict[Replaced, str]:
    """The units of a model that make it differ from what it was, each with how; those of `without` are as before.

    Found by halves. A half is looked at beside all that was found to agree before it, so that what is left agrees
    together, too.
    """
    with as_before(without):
        found = _how_it_differs(model, example, expected)
    if not found or not units:
        return {}
    if len(units) == 1:
        return {units[0]: found}
    half = len(units) // 2
    first = disagreeing(model, example, expected, units[:half], [*without, *units[half:]])
    return first | disagreeing(model, example, expected, units[half:], [*without, *first])


def _how_it_differs(model: nn.Module, example: Example, expected: dict[bool, Results]) -> str:
    for training, results in expected.items():
        try:
            differs = difference(example.results(model, training), results)
        except Exception as error:  # whatever a model raises that took the example as it was
            differs = f"it fails with {type(error).__name__}: {error}"
        if differs:
            return f"{differs} in {'training' if training else 'evaluation'}"
    return ""


@contextlib.contextmanager
def as_before(units: Sequence[Replaced]) -> Iterator[None]:
    """Within it these modules have the classes that they had."""
    classes = [type(unit) for unit in units]
    try:
        for unit in units:
            unit.__class__ = unit._class_before  # type: ignore[assignment]
        yield
    finally:
        for unit, cls in zip(units, classes, strict=True):
            unit.__class__ = cls
