"""Degradation: plain networks of more layers train worse, residual ones do not, and their layers respond less.

ResNet-20 and ResNet-56 of version 1 with batch norm and their plain twins, the same layers without shortcuts, learn
scikit-learn's digits by one schedule. Against the paper: 8 x 8 pixels of one channel, a quarter of its width, its
learning rate and weight decay, and a cosine where it divided the rate by ten twice. A shortcut that changes the shape
is a 1 x 1 convolution with a norm (its option B, where on CIFAR it took A, without parameters). Responses are of a
batch, of what a 3 x 3 convolution and its norm make before the sum and the ReLU, before and after training; a block's
branch is the second of its two. Gradients are of such a batch's loss by the outputs of the first and of the last 3 x 3
convolution, before their norms and before training. The quick setting looks at training errors alone.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fused_ops import BatchNorm2d, blocks
from fused_ops import functional as F

from ..digits import digits
from .study import Claim, Found, Numbers, Study, below, draw_mean, not_above, over_seeds, values
from .training import descend, gradient_ratio


@dataclass(frozen=True)
class Settings:
    """tolerance: of the training error, as a share. looks_inside: whether responses and gradients are judged, too.
    less: the least share by which a response is less than another. healthy: the largest ratio, either way, of a
    healthy gradient at the first layer to that at the last. residual: whether residual networks have their shortcuts.
    """

    epochs: int
    width: int
    batch: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 1e-4
    tolerance: float = 0.01
    looks_inside: bool = True
    less: float = 0.1
    healthy: float = 100
    residual: bool = True


FULL = Settings(epochs=30, width=4)
QUICK = Settings(epochs=5, width=4, batch=64, learning_rate=0.05, tolerance=0.1, looks_inside=False)


@dataclass(frozen=True)
class Network:
    """One of the four."""

    depth: int
    residual: bool


NETWORKS = {f"{kind}-{depth}": Network(depth, kind == "ResNet") for kind in ("plain", "ResNet") for depth in (20, 56)}
BUILD = {20: blocks.resnet20, 56: blocks.resnet56}


def conditions(settings: Settings) -> Mapping[str, Network]:
    """The same four, whatever the settings."""
    return NETWORKS


def measure(settings: Settings, network: Network, seed: int, device: torch.device) -> Numbers:
    """The training error of each epoch; before and after training how far responses spread; and before it, the
    gradient at the first layer over that at the last."""
    torch.manual_seed(seed)
    (images, labels), _ = digits(device)
    images = images.unsqueeze(1)
    residual = network.residual and settings.residual
    model = BUILD[network.depth](residual=residual, width=settings.width, in_channels=1).to(device)
    batch = images[: settings.batch]
    before = spread(model, batch)
    ratio = gradient_ratio(model, (batch, labels[: settings.batch]), of_layers(model, nn.Conv2d))
    history = descend(
        model,
        (images, labels),
        epochs=settings.epochs,
        batch=settings.batch,
        seed=seed,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    return {
        "error": [epoch.error for epoch in history],
        "final_error": history[-1].error,
        "gradient_ratio": ratio,
        **{f"initial_{name}": number for name, number in before.items()},
        **spread(model, batch),
    }


def spread(model: nn.Module, images: Tensor) -> Numbers:
    """`responses`, and their means over the layers."""
    deviations, changes = responses(model, images)
    found = {"responses": deviations, "response": statistics.mean(deviations), "changes": changes}
    if changes:
        found |= {"branch": statistics.mean(deviations[2::2]), "change": statistics.mean(changes)}
    return found


@torch.no_grad()
def responses(model: nn.Module, images: Tensor) -> tuple[list[float], list[float]]:
    """Of a batch: the deviation of what each 3 x 3 convolution and its norm make, before the sum and the ReLU; and
    where a sum follows, that over the deviation of the stream it is added to."""
    deviations, changes = [], []

    def record(norm: BatchNorm2d, operands: tuple[Tensor, ...]) -> None:
        deviation = F.batch_norm(operands[0], None, None, norm.weight, norm.bias, training=True).std()
        deviations.append(deviation.item())
        if len(operands) == 2:
            changes.append((deviation / operands[1].std()).item())

    handles = [norm.register_forward_pre_hook(record) for norm in of_layers(model, BatchNorm2d)]
    model(images)
    for handle in handles:
        handle.remove()
    return deviations, changes


def of_layers(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    """The convolutions of the layers, or their norms, without those of shortcuts."""
    return [layer for name, layer in model.named_modules() if isinstance(layer, kind) and "shortcut" not in name]


def claims(settings: Settings, found: Found) -> Sequence[Claim]:
    """The paper's figures 1, 4 and 7, and its section 4.1, in a sentence each."""
    error = {name: values(found, name, "final_error") for name in NETWORKS}
    judged = [
        below("plain-20 ends with less training error than plain-56", error["plain-20"], error["plain-56"], ".1%"),
        not_above(
            f"ResNet-56 ends with no more than ResNet-20 (within {settings.tolerance:.0%})",
            error["ResNet-56"], error["ResNet-20"], settings.tolerance, ".1%",
        ),
    ]  # fmt: skip
    if not settings.looks_inside:
        return judged
    less, ratio = settings.less, {name: values(found, name, "gradient_ratio") for name in NETWORKS}
    others = ", ".join(f"{name} {over_seeds(ratio[name])}" for name in NETWORKS if name != "plain-56")
    response = {name: values(found, name, "response") for name in NETWORKS}
    change = {name: values(found, name, "change") for name in ("ResNet-20", "ResNet-56")}
    return (
        *judged,
        Claim(
            f"plain-56's gradients are healthy before training: first layer over last up to {settings.healthy:g}",
            f"{over_seeds(ratio['plain-56'])}; {others}",
            all(1 / settings.healthy <= one <= settings.healthy for one in ratio["plain-56"]),
        ),
        below(
            f"layers of ResNet-56 respond less than those of plain-56, by over {less:.0%}",
            response["ResNet-56"], response["plain-56"], by=less,
        ),
        below(
            f"layers of ResNet-56 respond less than those of ResNet-20, by over {less:.0%}",
            response["ResNet-56"], response["ResNet-20"], by=less,
        ),
        below(
            f"F(x) tends to 0: branches of ResNet-56 respond less than before training, by over {less:.0%}",
            values(found, "ResNet-56", "branch"), values(found, "ResNet-56", "initial_branch"), by=less,
        ),
        below(
            f"a block of ResNet-56 changes its stream less than one of ResNet-20, by over {less:.0%}",
            change["ResNet-56"], change["ResNet-20"], by=less,
        ),
        below(
            f"and less than before training, by over {less:.0%}",
            change["ResNet-56"], values(found, "ResNet-56", "initial_change"), by=less,
        ),
    )  # fmt: skip


def draw(settings: Settings, found: Found, figure: Figure) -> None:
    """Training error over epochs, layers' responses and blocks' changes in their order, dotted before training."""
    panels = {
        "error": ("epoch", "training error"),
        "responses": ("layer", "deviation of its response"),
        "changes": ("block", "deviation of its branch / of its stream"),
    }
    for axes, (number, (over, what)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for place, name in enumerate(NETWORKS):
            curves = values(found, name, number)
            if not curves[0]:
                continue
            x = range(1, len(curves[0]) + 1)
            draw_mean(axes, x, curves, color=f"C{place}", label=name)
            if number != "error":
                draw_mean(axes, x, values(found, name, f"initial_{number}"), ":", color=f"C{place}", linewidth=1)
        if number != "error":
            axes.plot([], [], "k:", linewidth=1, label="before training")
        axes.set(xlabel=over, ylabel=what, ylim=(0, None))


STUDY = Study(
    name="degradation",
    title="Degradation of deep plain networks, and what each block of a residual one changes",
    source="He, Zhang, Ren, Sun, *Deep Residual Learning for Image Recognition*, arXiv:1512.03385, figures 1, 4 and 7",
    expected="The error of the deeper plain network is larger on the very images it is trained on, so it is not "
    "overfitted but harder to optimize. With shortcuts more layers do no harm, and what each layer adds to the stream "
    "shrinks with their number: F(x) tends to 0, a block is a small change of its input. The plain network's gradients "
    "are healthy, so that it is not for their vanishing or exploding that it trains badly (section 4.1).",
    full=FULL,
    quick=QUICK,
    cause="the shortcuts are taken out of the residual networks",
    without_cause=dataclasses.replace(QUICK, residual=False),
    conditions=conditions,
    measure=measure,
    claims=claims,
    draw=draw,
    meaning="The deeper plain network is worse by far, and shortcuts cure it. But not all of it is what the paper "
    "describes: through 56 layers of batch norm and ReLU without shortcuts the gradient grows by thousands towards the "
    "first, where theirs was healthy, and those layers' responses run away. And F(x) does not tend to 0: norms keep "
    "each branch's deviation near the 1 that it starts with, in 20 layers as in 56. What falls is its share in a "
    "stream that grows by a branch a block, before training already, and further as it is trained.",
)
