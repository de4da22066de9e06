"""Switchable weights: from smaller batches switchable norms take less of their statistics, and each layer its own mix.

A ResNet of version 1 with switchable norms learns scikit-learn's digits in updates of 32 images. Either all pass
through it together, or 4 at a time, and their gradients' mean makes one update. So updates are alike, and only the
batch that statistics are taken from differs, as between the paper's (1 GPU, 32 images) and (8 GPUs, 4 images each).
Shares are softmaxes of the learned weights and start as thirds. Against the paper: a small network; few updates, in
which a learning rate of 0.4 moves the shares far enough to be told apart; a cosine where it divided the rate by ten.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure

from fused_ops import SwitchNorm2d, blocks

from ..digits import digits
from .study import Claim, Found, Numbers, Study, below, over_seeds, values
from .training import InParts, error, fit

KINDS = ("instance", "layer", "batch")
STATISTICS = ("mean", "variance")


@dataclass(frozen=True)
class Settings:
    """batch: images of an update. small, large: how many of them statistics are taken from."""

    epochs: int
    stages: tuple[int, ...]
    width: int = 8
    small: int = 4
    large: int = 32
    batch: int = 32
    learning_rate: float = 0.4
    weight_decay: float = 1e-4


FULL = Settings(epochs=8, stages=(1, 1, 1))
QUICK = Settings(epochs=1, stages=(1, 1))


@dataclass(frozen=True)
class Part:
    """How many images pass through the network together."""

    images: int


def conditions(settings: Settings) -> Mapping[str, Part]:
    """The small batch and the large one."""
    return {"small": Part(settings.small), "large": Part(settings.large)}


def measure(settings: Settings, part: Part, seed: int, device: torch.device) -> Numbers:
    """For each layer the shares of instance, layer and batch in both statistics; and the batch's on average."""
    torch.manual_seed(seed)
    (images, labels), (test_images, test_labels) = digits(device)
    network = blocks.ResNet(settings.stages, "switch", width=settings.width, in_channels=1).to(device)
    model = InParts(network, part.images)
    optimizer = torch.optim.SGD(
        model.parameters(), settings.learning_rate, momentum=0.9, weight_decay=settings.weight_decay
    )
    steps = settings.epochs * (len(labels) // settings.batch)
    fit(
        model,
        (images.unsqueeze(1), labels),
        optimizer,
        epochs=settings.epochs,
        batch=settings.batch,
        seed=seed,
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
    )
    norms = {name: module for name, module in network.named_modules() if isinstance(module, SwitchNorm2d)}
    shares = {
        "mean": [norm.mean_weight.softmax(0).tolist() for norm in norms.values()],
        "variance": [norm.var_weight.softmax(0).tolist() for norm in norms.values()],
    }
    by_layer = torch.tensor([shares[statistic] for statistic in STATISTICS]).mean(0)
    return {
        "layers": list(norms),
        "error": error(model, (test_images.unsqueeze(1), test_labels)),
        "batch_by_layer": by_layer[:, KINDS.index("batch")].tolist(),
        **dict(zip(KINDS, by_layer.mean(0).tolist(), strict=True)),
        **shares,
    }


def claims(settings: Settings, found: Found) -> Sequence[Claim]:
    """What the paper says of batches and of layers; shares are means over both statistics."""
    share = {(name, kind): values(found, name, kind) for name in found for kind in KINDS}
    small, large = settings.small, settings.large
    others = [max(pair) for pair in zip(share["large", "instance"], share["large", "layer"], strict=True)]
    return (
        below(
            f"batch has less of a share with {small} images than with {large}, on average over layers",
            share["small", "batch"], share["large", "batch"], ".0%",
        ),
        below(f"with {large} images batch has the largest share of the three", others, share["large", "batch"], ".0%"),
        layers_differ(f"with {large} images its share differs more by layer than by seed (deviations)", found["large"]),
    )  # fmt: skip


def layers_differ(expected: str, runs: Sequence[Numbers]) -> Claim:
    """Compares the deviation over layers, of means over the seeds, with that over seeds, on average over layers."""
    by_layer = list(zip(*(one["batch_by_layer"] for one in runs), strict=True))
    over_layers = statistics.pstdev([statistics.mean(shares) for shares in by_layer])
    by_seed = [statistics.pstdev(shares) for shares in by_layer]
    found = f"{over_layers:.1%} against {over_seeds(by_seed, '.1%')}"
    return Claim(expected, found, over_layers > statistics.mean(by_seed))


def draw(settings: Settings, found: Found, figure: Figure) -> None:
    """Shares in each statistic over the layers: means over the seeds, all seeds behind."""
    styles = {"small": ("o--", settings.small), "large": ("s-", settings.large)}
    layers = found["large"][0]["layers"]
    for axes, statistic in zip(figure.subplots(1, 2, sharey=True), STATISTICS, strict=True):
        for place, kind in enumerate(KINDS):
            for name, (style, images) in styles.items():
                curves = [[shares[place] for shares in one[statistic]] for one in found[name]]
                for curve in curves:
                    axes.plot(layers, curve, style[1:], color=f"C{place}", linewidth=0.6, alpha=0.4)
                mean = [statistics.mean(at) for at in zip(*curves, strict=True)]
                axes.plot(layers, mean, style, color=f"C{place}", markersize=4, label=f"{kind}, {images} images")
        axes.axhline(1 / 3, color="0.5", linewidth=0.8, linestyle=":")
        axes.set(xlabel="layer", ylabel=f"share in the {statistic}", ylim=(0, 1))
        axes.tick_params(axis="x", labelrotation=40, labelsize=7)


STUDY = Study(
    name="switch_weights",
    title="Switchable weights: less of the statistics come from the batch where it is small",
    source="Luo, Ren, Peng, Zhang, Li, *Differentiable Learning-to-Normalize via Switchable Normalization*, "
    "arXiv:1806.10779, figure 1 and its analysis of batch sizes",
    expected="In classification batch norm's statistics have the largest share, and less of one where the batch is "
    "small and they are inaccurate: then instance and layer take over. The mixture differs from layer to layer.",
    full=FULL,
    quick=QUICK,
    cause="both batches are of 32 images",
    without_cause=dataclasses.replace(QUICK, small=32),
    conditions=conditions,
    measure=measure,
    claims=claims,
    draw=draw,
)
