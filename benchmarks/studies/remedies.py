"""Remedies: what lets a deep sigmoid network learn, and what does not.

One network of 3 x 3 convolutions (the first halves the image, none has a bias) and a linear layer learns scikit-learn's
digits; each remedy changes one thing in it, and a few two. Optimizer, learning rate, steps and initial weights (He's)
are the same for all. Pre-training comes on top: layer by layer a convolution, its sigmoid and a transposed convolution
learn to reconstruct the layer's input by cross-entropy, as in Bengio et al., then all layers are trained together.
Blocks are the package's; where there is no norm the activation alone stands in its place, behind the sum in version 1.
Gradients are by a convolution's output, before training, after pre-training where there is any. "layer" is the
package's layer norm of images, over all of a sample (GroupNorm of one group).

Against the papers: autoencoders of convolutions where Hinton had Boltzmann machines of full layers; one network for
all; Adam, which makes up for small gradients in part, so that clipping means less than with plain descent. It and its
rate were chosen by what the bare network of three layers, batch norm and the version 2 block need to learn in so few
steps: in trials with one seed, of which no numbers are kept, plain descent at 0.01 to 0.2 took several times as many,
and Adam at 0.01 lost the deep ones. No gradient explodes here, so clipping and penalties have nothing to remedy. The
quick setting has one remedy of each kind that does help: activation, norm, identity path.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as TF
from matplotlib.figure import Figure
from torch import Tensor, nn

from fused_ops import blocks
from fused_ops import functional as F
from fused_ops.blocks.norms import image_norms
from fused_ops.blocks.residual import convolution

from ..digits import batches, digits
from .study import Claim, Found, Numbers, Study, below, over_seeds, values
from .training import fit, gradient_ratio


@dataclass(frozen=True)
class Settings:
    """layers: convolutions. remedies: the conditions, all where there are none. learnt, unlearnt: as shares of the loss
    of guessing, ln 10, what a network that learns ends below, and one that does not ends above."""

    layers: int
    epochs: int
    remedies: tuple[str, ...] = ()
    width: int = 16
    batch: int = 32
    learning_rate: float = 0.003
    clip: float = 1.0
    l1: float = 1e-4
    l2: float = 1e-4
    pretraining_steps: int = 200
    pretraining_rate: float = 0.01
    learnt: float = 0.5
    unlearnt: float = 0.95


FULL = Settings(layers=15, epochs=8)
QUICK = Settings(layers=5, epochs=7, remedies=("bare", "relu", "batch norm", "v2 block"))
GUESSING = math.log(10)


@dataclass(frozen=True)
class Remedy:
    """What is changed in the bare network, which the defaults are; who says so, and whether it is to help."""

    source: str
    helps: bool = True
    activation: str = "sigmoid"
    norm: str | None = None
    block: str = "plain"
    weight_standardization: bool = False
    pretrained: bool = False
    clipped: bool = False
    l1: bool = False
    l2: bool = False


REMEDIES = {
    "bare": Remedy("Bengio 1994, Glorot 2010", helps=False),
    "gradient clipping": Remedy("Pascanu 2013: it is for those that explode", helps=False, clipped=True),
    "L1 penalty": Remedy("Pascanu 2013: it makes weights smaller", helps=False, l1=True),
    "L2 penalty": Remedy("the same", helps=False, l2=True),
    "pre-training": Remedy("Hinton 2006, Bengio 2006", pretrained=True),
    "relu": Remedy("Glorot 2011", activation="relu"),
    "leaky_relu": Remedy("Maas 2013", activation="leaky_relu"),
    "elu": Remedy("Clevert 2015", activation="elu"),
    "batch norm": Remedy("Ioffe 2015", norm="batch"),
    "layer norm": Remedy("Ba 2016", norm="layer"),
    "rms norm": Remedy("Zhang 2019", norm="rms"),
    "group norm": Remedy("Wu 2018", norm="group"),
    "instance norm": Remedy("Ulyanov 2016", norm="instance"),
    "switch norm": Remedy("Luo 2018", norm="switch"),
    "weight std.": Remedy("Qiao 2019, there with a norm", weight_standardization=True),
    "weight std., group norm": Remedy("Qiao 2019", weight_standardization=True, norm="group"),
    "v1 block": Remedy("He 2016, where a sum's activation stands in the path", helps=False, block="v1"),
    "v2 block": Remedy("He 2016", block="v2"),
    "v1 block, batch norm": Remedy("He 2015", block="v1", norm="batch"),
    "v2 block, batch norm": Remedy("He 2016", block="v2", norm="batch"),
}


class Unnormalized(nn.Module):
    """What stands for a block's norm where there is none: the activation, behind the sum if there is a residual."""

    def __init__(self, activation: str, returns_total: bool = False) -> None:
        super().__init__()
        self.activation, self.returns_total = activation, returns_total

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        activate = getattr(TF, self.activation)
        if residual is None:
            return activate(x)
        if not self.returns_total:
            return F.residual_add(x, residual, activation=self.activation)
        total = F.residual_add(x, residual)
        return activate(total), total


class Network(nn.Module):
    """A stem that halves the image, blocks of two convolutions, and a linear layer of all that is left."""

    def __init__(self, remedy: Remedy, layers: int, width: int) -> None:
        super().__init__()
        ws, self.carries_total = remedy.weight_standardization, remedy.block == "v2"
        options: dict[str, Any] = {"norm": remedy.norm or "batch", "activation": remedy.activation}
        if not self.carries_total:
            options["residual"] = remedy.block == "v1"
        block = blocks.PreActivationBlock if self.carries_total else blocks.BasicBlock
        self.stem = convolution(1, width, 3, stride=2, weight_standardization=ws)
        self.stem_norm = image_norms(options["norm"]).norm(width, activation=remedy.activation)
        self.blocks = nn.ModuleList(
            block(width, width, weight_standardization=ws, **options) for _ in range((layers - 1) // 2)
        )
        self.head = nn.Linear(width * 4 * 4, 10)
        if remedy.norm is None:
            self.stem_norm = Unnormalized(remedy.activation)
            for made in self.blocks:
                made.norm1 = Unnormalized(remedy.activation)
                made.norm2 = Unnormalized(remedy.activation, returns_total=self.carries_total)

    def forward(self, images: Tensor) -> Tensor:
        y = total = self.stem_norm(self.stem(images))
        for block in self.blocks:
            if self.carries_total:
                y, total = block(y, total)
            else:
                y = block(y)
        return self.head(y.flatten(1))

    def convolutions(self) -> list[nn.Conv2d]:
        """In the order in which an image meets them."""
        return [layer for layer in self.modules() if isinstance(layer, nn.Conv2d)]


def conditions(settings: Settings) -> Mapping[str, Remedy]:
    """Those of the settings."""
    return {name: remedy for name, remedy in REMEDIES.items() if not settings.remedies or name in settings.remedies}


def measure(settings: Settings, remedy: Remedy, seed: int, device: torch.device) -> Numbers:
    """The training loss of each epoch, and the gradient's norm at the first layer over that at the last, twice."""
    torch.manual_seed(seed)
    (images, labels), _ = digits(device)
    data = images.unsqueeze(1), labels
    model = Network(remedy, settings.layers, settings.width).to(device)
    if remedy.pretrained:
        pretrain(model, data[0], settings, seed)
    some = data[0][:256], labels[:256]
    ratio = gradient_ratio(model, some, model.convolutions())
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
    added, clip = penalty(model, remedy, settings), settings.clip if remedy.clipped else None
    history = fit(
        model, data, optimizer, epochs=settings.epochs, batch=settings.batch, seed=seed, penalty=added, clip=clip
    )
    after = gradient_ratio(model, some, model.convolutions())
    loss = [epoch.loss for epoch in history]
    return {"loss": loss, "final_loss": loss[-1], "ratio": ratio, "final_ratio": after}


def penalty(model: Network, remedy: Remedy, settings: Settings) -> Callable[[], Tensor] | None:
    """Of the weights of all layers, or none."""
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    if remedy.l1:
        return lambda: settings.l1 * torch.stack([weight.abs().sum() for weight in weights]).sum()
    if remedy.l2:
        return lambda: settings.l2 * torch.stack([weight.square().sum() for weight in weights]).sum()
    return None


def pretrain(model: Network, images: Tensor, settings: Settings, seed: int) -> None:
    """Each convolution in turn, as the encoder of an autoencoder of what the ones before it make of the images."""
    inputs, targets = images, (images + 1) / 2  # between 0 and 1, as cross-entropy needs them and a sigmoid's are
    for conv in model.convolutions():
        stride = conv.stride[0]
        shape = (conv.out_channels, conv.in_channels, 3, stride)
        decoder = nn.ConvTranspose2d(*shape, padding=1, output_padding=stride - 1).to(images.device)
        optimizer = torch.optim.Adam([*conv.parameters(), *decoder.parameters()], settings.pretraining_rate)
        for chosen in batches(len(inputs), settings.pretraining_steps, seed, settings.batch):
            batch = chosen.to(images.device)
            optimizer.zero_grad()
            decoded = decoder(torch.sigmoid(conv(inputs[batch])))
            TF.binary_cross_entropy_with_logits(decoded, targets[batch]).backward()
            optimizer.step()
        with torch.no_grad():
            inputs = targets = torch.sigmoid(conv(inputs))


def claims(settings: Settings, found: Found) -> Sequence[Claim]:
    """Which of them learn, and which version of a block learns more and keeps more of the gradient."""
    learnt, unlearnt = settings.learnt * GUESSING, settings.unlearnt * GUESSING
    judged = []
    for name, remedy in conditions(settings).items():
        loss = values(found, name, "final_loss")
        if remedy.helps:
            does, holds = f"learns, its loss falls below {learnt:.2f}", all(one < learnt for one in loss)
        else:
            does = f"does not learn, its loss stays above {unlearnt:.2f}"
            holds = all(one > unlearnt for one in loss)
        judged.append(Claim(f"{name}: {does} ({remedy.source})", over_seeds(loss), holds))
    if "v1 block" not in found:
        return judged
    for with_norm in ("", ", batch norm"):
        v1, v2 = (f"{version} block{with_norm}" for version in ("v1", "v2"))
        for number, small, large, says in (
            ("final_loss", v2, v1, "ends with less loss"),
            ("ratio", v1, v2, "keeps less of the gradient"),
        ):
            expected = f"{small}: {says} than {large} (He 2016)"
            judged.append(below(expected, values(found, small, number), values(found, large, number)))
    return judged


def draw(settings: Settings, found: Found, figure: Figure) -> None:
    """The final loss and the ratio of gradients of each remedy: means over the seeds large, all seeds small."""
    losses, ratios = figure.subplots(1, 2, sharey=True)
    for axes, number in ((losses, "final_loss"), (ratios, "ratio")):
        for place, name in enumerate(found):
            of_seeds = values(found, name, number)
            mean = statistics.geometric_mean(of_seeds) if axes is ratios else statistics.mean(of_seeds)
            axes.plot(of_seeds, [place] * len(of_seeds), "o", color="C0", markersize=3, alpha=0.4)
            axes.plot(mean, place, "D", color="C0", markersize=5)
    losses.axvline(GUESSING, color="C3", linestyle="--", label="guessing, ln 10")
    losses.set_yticks(range(len(found)), list(found), fontsize=7)
    losses.invert_yaxis()
    losses.set(xlabel="training loss of the last epoch (nats)", xlim=(0, None))
    ratios.set(xlabel="gradient norm, first over last layer, before training", xscale="log")


STUDY = Study(
    name="remedies",
    title="Remedies for a deep sigmoid network",
    source="Hinton, Osindero, Teh, *A Fast Learning Algorithm for Deep Belief Nets*, 2006; Bengio et al., *Greedy "
    "Layer-Wise Training of Deep Networks*, 2006; Pascanu, Mikolov, Bengio, arXiv:1211.5063; Ioffe, Szegedy, "
    "arXiv:1502.03167; He et al., arXiv:1603.05027; and those named below",
    expected="A sigmoid's slope is at most 0.25, so the first layers of the bare network get next to no gradient and "
    "its loss stays at that of guessing. Clipping and penalties make no gradient larger and do not help. Activations "
    "of larger slope, norms in front of the sigmoid, an identity path that nothing interrupts, and pre-training do.",
    full=FULL,
    quick=QUICK,
    cause="the depth: three convolutions, which learn as they are",
    without_cause=dataclasses.replace(QUICK, layers=3),
    conditions=conditions,
    measure=measure,
    claims=claims,
    draw=draw,
    meaning="Layer, rms and group norm are expected to help by the papers, not by their arithmetic: a sigmoid's "
    "outputs have a mean of 0.5, which becomes a constant of each channel behind the next convolution, and statistics "
    "that channels share leave it there and divide by it (see the study of gradient flow). Pre-training's gain is not "
    "that of its additional steps: its ratio of gradients is another before training begins.",
)
