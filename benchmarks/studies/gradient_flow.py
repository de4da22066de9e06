"""Gradient flow: through 50 layers gradients vanish or explode; which norms and identity paths hold them.

A layer is conv(act(norm(x))) of 3 x 3 convolutions in 16 channels on scikit-learn's digits; with an identity path it is
added to x, which nothing else touches. Without norm and path there is nothing of the package in it. At initialization,
in one forward and backward pass, the norm of the loss's gradient in the input of each layer is taken, and the share of
units whose activation has a slope below a tenth of its largest (relu's that are off among them, half of all).
Everything is float64, as gradients down to 1e-49 come out. Weights are normal, of deviation gain / sqrt(fan_in), small
ones with a gain of 0.5, large ones of 4. A gradient counts as held where it changes by less than a tenth of a decade a
layer on average, a factor of 1.26 either way: much less than without norm and path, and still up to 10^5 over 50
layers. So how many keep to half of that is told as well, a factor of 300 over all. "layer" is the package's layer norm
of images, over all of a sample (GroupNorm of one group). The quick setting is the sigmoid with the two norms that hold
it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from fused_ops import functional as F
from fused_ops.blocks.norms import image_norms

from ..digits import digits
from .study import Claim, Found, Numbers, Study, below, draw_mean, over_seeds, values


@dataclass(frozen=True)
class Settings:
    """held: decades a layer that a gradient may change by. saturated: a slope below this share of the largest.
    more: the least share of units by which more are saturated than of others. remedies: whether networks have their
    norms and identity paths."""

    activations: tuple[str, ...]
    norms: tuple[str, ...]
    images: int
    layers: int = 50
    channels: int = 16
    small: float = 0.5
    large: float = 4.0
    held: float = 0.1
    saturated: float = 0.1
    more: float = 0.05
    remedies: bool = True


FULL = Settings(
    activations=("sigmoid", "tanh", "relu", "leaky_relu", "elu"),
    norms=("batch", "layer", "rms", "group", "instance", "switch"),
    images=32,
)
QUICK = Settings(activations=("sigmoid",), norms=("batch", "instance"), images=8)

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "leaky_relu": nn.functional.leaky_relu,
    "elu": nn.functional.elu,
}
RELATIVE_SLOPES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda y: 4 * y * (1 - y),
    "tanh": lambda y: 1 - y**2,
    "relu": lambda y: (y > 0).to(y.dtype),
    "leaky_relu": lambda y: torch.where(y > 0, 1, 0.01),
    "elu": lambda y: 1 + y.clamp(max=0),
}
"""Of an activation's output, as what a fused norm gives it is not seen; as a share of the largest slope."""
BOUNDED = ("sigmoid", "tanh")
SIZES = ("small", "large")


@dataclass(frozen=True)
class Network:
    """All its layers are alike; a norm of None is none."""

    activation: str
    gain: float
    norm: str | None
    path: bool


def named(activation: str, weights: str, norm: str | None, path: bool) -> str:
    """A condition's name."""
    return f"{activation}, {weights} weights, {column(norm, path)}"


def column(norm: str | None, path: bool) -> str:
    """What a network has to hold its gradient."""
    return " + ".join([*([norm] if norm else []), *(["path"] if path else [])]) or "nothing"


def conditions(settings: Settings) -> Mapping[str, Network]:
    """All combinations."""
    weights = {"small": settings.small, "large": settings.large}
    return {
        named(activation, size, norm, path): Network(activation, weights[size], norm, path)
        for activation, size, path, norm in itertools.product(
            settings.activations, weights, (False, True), (None, *settings.norms)
        )
    }


def measure(settings: Settings, network: Network, seed: int, device: torch.device) -> Numbers:
    """For each layer's input, and then the head's: its gradient's norm as a power of 10, and who is saturated."""
    torch.manual_seed(seed)
    norm, path = (network.norm, network.path) if settings.remedies else (None, False)
    (images, labels), _ = digits(device)
    images, labels = images[: settings.images, None].double(), labels[: settings.images]
    stem, *convolutions = (
        convolution(1 if layer == 0 else settings.channels, settings.channels, network.gain).to(device)
        for layer in range(settings.layers + 1)
    )
    head = nn.Linear(settings.channels, 10, dtype=torch.float64, device=device)
    activation = ACTIVATIONS[network.activation]

    def activated(branch: Tensor, stream: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next layer's input after norm and activation, and as it is."""
        if norm is None:
            x = branch if stream is None else F.residual_add(branch, stream)
            return activation(x), x
        make = image_norms(norm).norm if stream is None else image_norms(norm).add_norm
        module = make(settings.channels, activation=network.activation).to(device, torch.float64)
        return (module(branch), branch) if stream is None else module(branch, stream)

    # The gradient in a branch is that in the sum which it goes into, and this is the next layer's input. The sum itself
    # does not tell: a fused module hands it on, and has its own use of it within.
    branches, outputs = [stem(images)], []
    y, stream = activated(branches[0], None)
    for conv in convolutions:
        outputs.append(y)
        branches.append(conv(y))
        y, stream = activated(branches[-1], stream if path else None)
    outputs.append(y)
    loss = nn.functional.cross_entropy(head(y.mean((2, 3))), labels)
    gradients = [gradient.norm().item() for gradient in torch.autograd.grad(loss, branches)]
    slopes = [RELATIVE_SLOPES[network.activation](output.detach()) for output in outputs]
    saturated = [(slope < settings.saturated).double().mean().item() for slope in slopes]
    powers = [math.log10(max(gradient, 1e-300)) for gradient in gradients]
    return {
        "gradients": [round(power, 2) for power in powers],
        "change": (powers[0] - powers[-1]) / settings.layers,
        "saturated": statistics.mean(saturated),
    }


def convolution(inputs: int, outputs: int, gain: float) -> nn.Conv2d:
    """3 x 3, with weights of deviation gain / sqrt(fan_in)."""
    made = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, dtype=torch.float64)
    nn.init.normal_(made.weight, std=gain / math.sqrt(9 * inputs))
    return made


def claims(settings: Settings, found: Found) -> Sequence[Claim]:
    """What goes wrong without norm and path, and that each of them, and both, hold it."""
    judged = [
        changes(f"a sigmoid makes it vanish, {size} weights", settings, found, named("sigmoid", size, None, False), -1)
        for size in SIZES
    ]
    for kind in settings.activations:
        small, large = (named(kind, size, None, False) for size in SIZES)
        if kind in BOUNDED:
            few, many = (values(found, name, "saturated") for name in (small, large))
            expected = f"large weights saturate more units than small ones, by over {settings.more:.0%} of all, {kind}"
            judged.append(below(expected, few, many, ".0%", settings.more))
        else:
            judged.append(changes(f"large weights make it explode, {kind}", settings, found, large, 1))
    for norm in settings.norms:
        judged.append(holds(f"{norm} norm holds it", settings, found, [norm], False, SIZES))
    for size in SIZES:
        judged.append(holds(f"an identity path holds it, {size} weights", settings, found, [None], True, [size]))
    judged.append(
        holds("each norm and an identity path together hold it", settings, found, settings.norms, True, SIZES)
    )
    return judged


def changes(expected: str, settings: Settings, found: Found, name: str, sign: int) -> Claim:
    """Whether with every seed the gradient shrinks (-1) or grows (1) by more than what counts as held."""
    change = values(found, name, "change")
    holds = all(sign * value > settings.held for value in change)
    return Claim(expected, f"{over_seeds(change, '.2f')} decades a layer", holds)


def holds(
    expected: str,
    settings: Settings,
    found: Found,
    norms: Sequence[str | None],
    path: bool,
    sizes: Sequence[str],
) -> Claim:
    """Whether with every seed and activation the gradient is held, where it changes most, and how often it is held
    twice as well; one that diverged is not."""
    names = [named(kind, size, norm, path) for kind in settings.activations for size in sizes for norm in norms]
    by_name = {name: values(found, name, "change") for name in names}
    held, twice = (
        sum(all(abs(one) <= limit for one in change) for change in by_name.values())
        for limit in (settings.held, settings.held / 2)
    )
    worst = max(names, key=lambda name: max(map(abs, by_name[name])))
    said = f"{over_seeds(values(found, worst, 'change'), '.2f')} decades a layer at most ({worst})"
    count = f"in {held} of {len(names)}, in {twice} to {settings.held / 2:g}"
    return Claim(f"{expected}, to {settings.held:g} decades a layer", f"{said}; {count}", held == len(names))


def draw(settings: Settings, found: Found, figure: Figure) -> None:
    """The gradient over the layers of one activation, and all networks in two tables."""
    layers, change, saturated = figure.subplots(1, 3, gridspec_kw={"width_ratios": [1.1, 1.2, 1.2]})
    kind = settings.activations[0]
    for place, (norm, path) in enumerate([(None, False), (None, True), *((norm, False) for norm in settings.norms)]):
        curves = values(found, named(kind, "small", norm, path), "gradients")
        draw_mean(layers, range(1, len(curves[0]) + 1), curves, color=f"C{place}", label=column(norm, path))
    layers.set(xlabel="layer", ylabel=f"log10 of the norm of dL/dx ({kind}, small weights)")
    table(settings, found, change, "change", settings.layers, "RdBu_r", (-10, 10))
    change.set_title("decades from the last layer to the first", fontsize=8)
    table(settings, found, saturated, "saturated", 100, "Greys", (0, 100))
    saturated.set_title("saturated units, %", fontsize=8)


def table(
    settings: Settings, found: Found, axes: Axes, number: str, factor: float, colors: str, span: tuple[int, int]
) -> None:
    """A cell for each network: a number's mean over the seeds."""
    rows = [(kind, size) for kind in settings.activations for size in SIZES]
    columns = [(norm, path) for path in (False, True) for norm in (None, *settings.norms)]
    cells = [
        [factor * statistics.mean(values(found, named(*row, *held_by), number)) for held_by in columns] for row in rows
    ]
    axes.pcolormesh(cells, cmap=colors, vmin=span[0], vmax=span[1], alpha=0.6)
    for y, x in itertools.product(range(len(rows)), range(len(columns))):
        axes.text(x + 0.5, y + 0.5, str(round(cells[y][x])), ha="center", va="center", fontsize=6)
    axes.set_xticks([x + 0.5 for x in range(len(columns))], [column(*one) for one in columns], rotation=90, fontsize=6)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], [", ".join(row) for row in rows], fontsize=6)
    axes.invert_yaxis()


STUDY = Study(
    name="gradient_flow",
    title="Gradient flow: what makes gradients vanish and explode, and what holds them",
    source="the vanishing gradients of Hochreiter 1991 and of Glorot, Bengio 2010, *Understanding the difficulty of "
    "training deep feedforward neural networks*; He, Zhang, Ren, Sun, *Identity Mappings in Deep Residual Networks*, "
    "arXiv:1603.05027",
    expected="A sigmoid's slope is at most 0.25, so that its gradient vanishes in a deep network. Large weights make "
    "gradients explode, or saturate the units. A norm or an identity path holds them.",
    full=FULL,
    quick=QUICK,
    cause="norms and identity paths are taken out of the networks that have them",
    without_cause=dataclasses.replace(QUICK, remedies=False),
    conditions=conditions,
    measure=measure,
    claims=claims,
    draw=draw,
    meaning="The expectation is too general in two places. A norm holds a sigmoid only if it takes away each channel's "
    "mean, as batch and instance norm do: the outputs' mean of 0.5 becomes a constant of each channel in the next "
    "convolution, larger than what varies, and the other norms divide by it, so that layer for layer the signal and "
    "its gradient shrink. (A tanh, whose outputs have no mean, all norms hold; a relu's gradient grows by up to 1.2 a "
    "layer where the mean is taken away.) And without a norm an identity path holds what small weights or a bounded "
    "activation add to it, but not what large weights make of an unbounded one: the stream then grows by a factor a "
    "layer. Of the bounded ones most units are then saturated. With both it is held throughout, and twice as well.",
)
