"""Switchable weights: from smaller batches switchable norms take less of their statistics, and each layer its own mix.

A ResNet of version 1 with switchable norms learns scikit-learn's digits in updates of 32 images. Either all pass
through it together, or 4 at a time, and their gradients' mean makes one update. So updates are alike, and only the
batch that statistics are taken from differs, as between the paper's (1 GPU, 32 images) and (8 GPUs, 4 images each).
Shares are softmaxes of the learned weights and start as thirds. Against the paper: a small network; few updates, in
which a learning rate of 0.4 moves the shares far enough to be told apart; a cosine where it divided the rate by ten.
That layers differ more than seeds needs two of these.
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
from .study import Claim, Found, Numbers, Study, below, draw_mean, values
from .training import InParts, descend, error

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


def conditions(settings: Settings) -> Mapping[str, int]:
    """How many images pass through the network together."""
    return {"small": settings.small, "large": settings.large}


def measure(settings: Settings, together: int, seed: int, device: torch.device) -> Numbers:
    """For each layer the shares of instance, layer and batch in both statistics; and the batch's on average."""
    torch.manual_seed(seed)
    (images, labels), (test_images, test_labels) = digits(device)
    network = blocks.ResNet(settings.stages, "switch", width=settings.width, in_channels=1).to(device)
    model = InParts(network, together)
    descend(
        model,
        (images.unsqueeze(1), labels),
        epochs=settings.epochs,
        batch=settings.batch,
        seed=seed,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
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
    judged = [
        below(
            f"batch has less of a share with {small} images than with {large}, on average over layers",
            share["small", "batch"], share["large", "batch"], ".0%",
        ),
        below(f"with {large} images batch has the largest share of the three", others, share["large", "batch"], ".0%"),
    ]  # fmt: skip
    if len(found["large"]) > 1:
        expected = f"with {large} images its share differs more by layer than by seed (deviations)"
        judged.append(layers_differ(expected, found["large"]))
    return judged


def layers_differ(expected: str, runs: Sequence[Numbers]) -> Claim:
    """Compares the deviation over layers, of means over the seeds, with that over seeds, on average over layers."""
    by_layer = list(zip(*(one["batch_by_layer"] for one in runs), strict=True))
    over_layers = statistics.pstdev([statistics.mean(shares) for shares in by_layer])
    by_seed = statistics.mean(statistics.pstdev(shares) for shares in by_layer)
    return Claim(expected, f"{over_layers:.1%} against {by_seed:.1%}", over_layers > by_seed)


def draw(settings: Settings, found: Found, figure: Figure) -> None:
    """Shares in each statistic over the layers: means over the seeds, all seeds behind."""
    styles = {"small": ("o--", settings.small), "large": ("s-", settings.large)}
    layers = found["large"][0]["layers"]
    for axes, statistic in zip(figure.subplots(1, 2, sharey=True), STATISTICS, strict=True):
        for place, kind in enumerate(KINDS):
            for name, (style, images) in styles.items():
                curves = [[shares[place] for shares in of_layers] for of_layers in values(found, name, statistic)]
                label = f"{kind}, {images} images"
                draw_mean(axes, layers, curves, style, color=f"C{place}", markersize=4, label=label)
        axes.axhline(1 / 3, color="0.5", linewidth=0.8, linestyle=":")
        axes.set(xlabel="layer", ylabel=f"share in the {statistic}", ylim=(0, 1))
        axes.tick_params(axis="x", labelrotation=40, labelsize=7)


STUDY = Study(
    name="switch_weights",
    title="Switchable weights: the mixture that SwitchNorm learns",
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
    meaning="With 4 images the batch keeps on average the third that it starts with: it is with 32 that its share "
    "grows, and with 4 that it gives way in the last layers, to the layer.",
)
