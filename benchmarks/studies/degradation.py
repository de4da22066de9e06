"""Degradation: plain networks of more layers train worse, residual ones do not, and their layers respond less.

ResNet-20 and ResNet-56 of version 1 with batch norm and their plain twins, the same layers without shortcuts, learn
scikit-learn's digits by one schedule. Against the paper: 8 x 8 pixels of one channel, a quarter of its width, its
learning rate and weight decay, and a cosine where it divided the rate by ten twice. A shortcut that changes the shape
is a 1 x 1 convolution with a norm (its option B, where on CIFAR it took A, without parameters).
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
from .study import Claim, Found, Numbers, Study, below, not_above, values
from .training import fit


@dataclass(frozen=True)
class Settings:
    """residual: whether residual networks have their shortcuts. tolerance: of the training error, as a share."""

    epochs: int
    width: int
    batch: int = 128
    learning_rate: float = 0.1
    weight_decay: float = 1e-4
    tolerance: float = 0.01
    residual: bool = True


FULL = Settings(epochs=30, width=4)
QUICK = Settings(epochs=5, width=4, batch=64, learning_rate=0.05, tolerance=0.1)


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
    """The training error of each epoch, and how far each layer's response spreads after the last."""
    torch.manual_seed(seed)
    (images, labels), _ = digits(device)
    images = images.unsqueeze(1)
    residual = network.residual and settings.residual
    model = BUILD[network.depth](residual=residual, width=settings.width, in_channels=1).to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), settings.learning_rate, momentum=0.9, weight_decay=settings.weight_decay
    )
    steps = settings.epochs * (len(labels) // settings.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history = fit(
        model,
        (images, labels),
        optimizer,
        epochs=settings.epochs,
        batch=settings.batch,
        seed=seed,
        schedule=schedule,
    )
    deviations, changes = responses(model, images[: settings.batch])
    return {
        "error": [epoch.error for epoch in history],
        "final_error": history[-1].error,
        "responses": deviations,
        "response": statistics.mean(deviations),
        "changes": changes,
        "change": statistics.mean(changes) if changes else 1.0,  # all that leaves a block without a sum is new
    }


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

    norms = [norm for name, norm in model.named_modules() if isinstance(norm, BatchNorm2d) and "shortcut" not in name]
    handles = [norm.register_forward_pre_hook(record) for norm in norms]
    model(images)
    for handle in handles:
        handle.remove()
    return deviations, changes


def claims(settings: Settings, found: Found) -> Sequence[Claim]:
    """The paper's figures 1, 4 and 7 in a sentence each."""
    error = {name: values(found, name, "final_error") for name in NETWORKS}
    change = {name: values(found, name, "change") for name in NETWORKS}
    response = {name: values(found, name, "response") for name in NETWORKS}
    return (
        below("plain-20 ends with less training error than plain-56", error["plain-20"], error["plain-56"], ".1%"),
        not_above(
            f"ResNet-56 ends with no more than ResNet-20 (within {settings.tolerance:.0%})",
            error["ResNet-56"], error["ResNet-20"], settings.tolerance, ".1%",
        ),
        below("layers of ResNet-56 respond less than those of plain-56", response["ResNet-56"], response["plain-56"]),
        below("layers of ResNet-56 respond less than those of ResNet-20", response["ResNet-56"], response["ResNet-20"]),
        below(
            "a block of ResNet-56 changes its stream less than one of ResNet-20",
            change["ResNet-56"], change["ResNet-20"],
        ),
    )  # fmt: skip


def draw(settings: Settings, found: Found, figure: Figure) -> None:
    """Training error over epochs, layers' responses and blocks' changes in their order: means over the seeds, and each
    seed behind."""
    panels = {
        "error": ("epoch", "training error"),
        "responses": ("layer", "deviation of its response"),
        "changes": ("block", "deviation of its branch / of its stream"),
    }
    for axes, (number, (over, what)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for place, name in enumerate(NETWORKS):
            curves = [one[number] for one in found[name]]
            if not curves[0]:
                continue
            for curve in curves:
                axes.plot(range(1, len(curve) + 1), curve, color=f"C{place}", linewidth=0.6, alpha=0.4)
            mean = [statistics.mean(at) for at in zip(*curves, strict=True)]
            axes.plot(range(1, len(mean) + 1), mean, color=f"C{place}", label=name)
        axes.set(xlabel=over, ylabel=what, ylim=(0, None))


STUDY = Study(
    name="degradation",
    title="Degradation: deeper plain networks train worse, residual ones do not",
    source="He, Zhang, Ren, Sun, *Deep Residual Learning for Image Recognition*, arXiv:1512.03385, figures 1, 4 and 7",
    expected="The error of the deeper plain network is larger on the very images it is trained on, so it is not "
    "overfitted but harder to optimize. With shortcuts more layers do no harm, and what each layer adds to the stream "
    "shrinks with their number: F(x) tends to 0, a block is a small change of its input.",
    full=FULL,
    quick=QUICK,
    cause="the shortcuts are taken out of the residual networks",
    without_cause=dataclasses.replace(QUICK, residual=False),
    conditions=conditions,
    measure=measure,
    claims=claims,
    draw=draw,
)
