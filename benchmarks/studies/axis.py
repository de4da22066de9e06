"""Axis: a norm may take away only what carries no information, so the one that removes the informative axis loses.

Three comparisons on scikit-learn's digits, one norm against another in the same network, by the error on 360 images
that were not trained on. A recurrent network (h = tanh(norm(W x + U h)), norm and tanh one call) and a small
Transformer read an image row by row, 8 steps of 8 pixels, with batch and with layer norm. Their batch norm is one
module for all steps, so in the recurrent network one set of running statistics serves them all (Ba et al. name this as
its trouble; Cooijmans et al., arXiv:1603.09025, keep a set a step). The batch is small, the same for all. A small
convolutional network with batch and with instance norm sees images multiplied by a contrast: by any between the lowest
and the highest, when it tells the digit, and by one of so many levels, when it tells the level. Contrasts are spaced
evenly on a logarithmic scale, drawn once for each image, and those of the test are like those of training: no shift is
needed for the difference. eps is small: with torch's 1e-5 instance norm leaves enough of the contrast to tell its level
(measured beside it). Against the papers: their data are text and photographs, ours are images of 8 x 8 pixels. The
quick setting has the contrasts alone.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from fused_ops import BatchNorm1d, LayerNorm, blocks
from fused_ops.blocks.norms import image_norms, sequence_norms

from ..digits import Labelled, digits
from .study import Claim, Found, Numbers, Study, below, over_seeds, values
from .training import error, fit

Task = Literal["recurrent", "transformer", "nuisance", "label"]


@dataclass(frozen=True)
class Settings:
    """lowest, highest: of the contrasts. gain: the least by which instance norm does better than batch norm.
    near_guessing: how far from the error of a guess still is one."""

    epochs: int
    tasks: tuple[Task, ...] = ("recurrent", "transformer", "nuisance", "label")
    width: int = 32
    layers: int = 2
    heads: int = 4
    channels: int = 8
    eps: float = 1e-9
    batch: int = 16
    learning_rate: float = 0.002
    lowest: float = 1 / 64
    highest: float = 1.0
    levels: int = 4
    gain: float = 0.01
    near_guessing: float = 0.1


FULL = Settings(epochs=15)
QUICK = Settings(epochs=3, tasks=("nuisance", "label"), batch=32, learning_rate=0.005)
TORCHS_EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """A task, and the norm of the network that learns it; its eps, where it is not that of the settings."""

    task: Task
    norm: str
    eps: float | None = None


CASES = {
    "recurrent, batch": Case("recurrent", "batch"),
    "recurrent, layer": Case("recurrent", "layer"),
    "Transformer, batch": Case("transformer", "batch"),
    "Transformer, layer": Case("transformer", "layer"),
    "contrast nuisance, batch": Case("nuisance", "batch"),
    "contrast nuisance, instance": Case("nuisance", "instance"),
    "contrast label, batch": Case("label", "batch"),
    "contrast label, instance": Case("label", "instance"),
    "contrast label, instance, torch's eps": Case("label", "instance", TORCHS_EPS),
}


class Recurrent(nn.Module):
    """h = tanh(norm(W x + U h)) over the rows, and a linear layer of the last h."""

    def __init__(self, norm: str, width: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(8, width, bias=False)
        self.state = nn.Linear(width, width, bias=False)
        nn.init.orthogonal_(self.state.weight)
        self.norm = {"batch": BatchNorm1d, "layer": LayerNorm}[norm](width, activation="tanh")
        self.head = nn.Linear(width, 10)

    def forward(self, rows: Tensor) -> Tensor:
        driven = self.inputs(rows)
        h = torch.zeros_like(driven[:, 0])
        for step in range(rows.shape[1]):
            h = self.norm(driven[:, step] + self.state(h))
        return self.head(h)


class Transformer(nn.Module):
    """Rows as tokens with learned places, blocks of the package, its norm, and a linear layer of the mean."""

    def __init__(self, norm: str, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(8, width)
        self.places = nn.Parameter(0.1 * torch.randn(8, width))
        self.blocks = nn.Sequential(
            *(blocks.TransformerBlock(width, heads, mlp_ratio=2, norm=norm) for _ in range(layers))
        )
        self.norm = sequence_norms(norm).norm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.inputs(rows) + self.places)).mean(1))


def convolutional(norm: str, channels: int, eps: float, classes: int) -> nn.Module:
    """Two 3 x 3 convolutions, each with its norm and ReLU in one call, and a linear layer."""
    made = image_norms(norm).norm
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1, bias=False),
        made(channels, eps=eps, activation="relu"),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False),
        made(2 * channels, eps=eps, activation="relu"),
        nn.Flatten(),
        nn.Linear(2 * channels * 4 * 4, classes),
    )


def build(settings: Settings, case: Case) -> nn.Module:
    """The network of a task."""
    if case.task == "recurrent":
        return Recurrent(case.norm, settings.width)
    if case.task == "transformer":
        return Transformer(case.norm, settings.width, settings.layers, settings.heads)
    classes = settings.levels if case.task == "label" else 10
    return convolutional(case.norm, settings.channels, case.eps or settings.eps, classes)


def contrasted(settings: Settings, task: Task, data: Labelled, generator: torch.Generator) -> Labelled:
    """Images (N, 1, 8, 8), each times a contrast of its own, and the label: the digit or the contrast's level."""
    images, labels = data
    count = len(labels)
    if task == "label":
        level = torch.randint(settings.levels, (count,), generator=generator)
        place, labels = level / (settings.levels - 1), level.to(labels.device)
    else:
        place = torch.rand(count, generator=generator)
    contrast = settings.lowest * (settings.highest / settings.lowest) ** place
    return (images * contrast.to(images.device)[:, None, None]).unsqueeze(1), labels


def conditions(settings: Settings) -> Mapping[str, Case]:
    """Those of the settings' tasks."""
    return {name: case for name, case in CASES.items() if case.task in settings.tasks}


def measure(settings: Settings, case: Case, seed: int, device: torch.device) -> Numbers:
    """The error on the training images of each epoch, and on the test images after the last: by running statistics,
    and by those of the test images themselves."""
    train, test = digits(device)
    if case.task in ("nuisance", "label"):
        generator = torch.Generator().manual_seed(seed)
        train, test = (contrasted(settings, case.task, data, generator) for data in (train, test))
    torch.manual_seed(seed)
    model = build(settings, case).to(device)
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
    history = fit(model, train, optimizer, epochs=settings.epochs, batch=settings.batch, seed=seed)
    return {
        "training_error": [epoch.error for epoch in history],
        "final_training_error": history[-1].error,
        "test_error": error(model, test),
        "test_error_by_its_own_statistics": error(model, test, training=True),
    }


def claims(settings: Settings, found: Found) -> Sequence[Claim]:
    """Which norm does better, task by task."""
    return [claim for task in settings.tasks for claim in OF_TASK[task](settings, found)]


def pair(found: Found, task: str, norm: str, number: str = "test_error") -> tuple[list[float], list[float]]:
    """A number of the norm, and the same of batch norm."""
    return values(found, f"{task}, {norm}", number), values(found, f"{task}, batch", number)


def of_recurrent(settings: Settings, found: Found) -> Sequence[Claim]:
    """Layer norm, on either images."""
    expected = "in a recurrent network layer norm errs less than batch norm"
    trained = pair(found, "recurrent", "layer", "final_training_error")
    return [
        below(expected, *pair(found, "recurrent", "layer"), ".1%"),
        below(f"{expected}, on the images it trains on", *trained, ".1%"),
    ]


def of_transformer(settings: Settings, found: Found) -> Sequence[Claim]:
    """Layer norm."""
    expected = "in a Transformer layer norm errs less than batch norm"
    return [below(expected, *pair(found, "Transformer", "layer"), ".1%")]


def of_nuisance(settings: Settings, found: Found) -> Sequence[Claim]:
    """Instance norm."""
    expected = f"where the contrast is a nuisance instance norm errs less than batch norm (by over {settings.gain:.0%})"
    return [below(expected, *pair(found, "contrast nuisance", "instance"), ".1%", settings.gain)]


def of_label(settings: Settings, found: Found) -> Sequence[Claim]:
    """Batch norm, and instance norm is blind."""
    instance, batch = pair(found, "contrast label", "instance")
    guess, near = 1 - 1 / settings.levels, settings.near_guessing
    return [
        Claim(
            f"where it is the label instance norm guesses (error {guess:.0%}, within {near:.0%})",
            over_seeds(instance, ".1%"),
            all(abs(one - guess) <= near for one in instance),
        ),
        below(f"and batch norm does not (is better by over {near:.0%})", batch, instance, ".1%", near),
    ]


OF_TASK = {
    "recurrent": of_recurrent,
    "transformer": of_transformer,
    "nuisance": of_nuisance,
    "label": of_label,
}


def draw(settings: Settings, found: Found, figure: Figure) -> None:
    """The error on the test images, task by task, a color a norm: means over the seeds as bars, all seeds as dots."""
    digit, level = figure.subplots(1, 2, width_ratios=(3, 1))
    colors = {"batch": "C0", "layer": "C1", "instance": "C2"}
    of_digits = [task for task in settings.tasks if task != "label"]
    for axes, tasks in ((digit, of_digits), (level, ["label"])):
        for place, task in enumerate(tasks):
            for side, (name, case) in enumerate((n, c) for n, c in CASES.items() if c.task == task):
                wrong, x = values(found, name, "test_error"), place + 0.3 * side
                axes.bar(x, statistics.mean(wrong), 0.28, color=colors[case.norm], alpha=0.25 if case.eps else 0.5)
                axes.plot([x] * len(wrong), wrong, "o", color=colors[case.norm], markersize=4)
        axes.set_ylabel("error on the test images")
    names = {"nuisance": "contrast a nuisance"}
    digit.set_xticks([place + 0.15 for place in range(len(of_digits))], [names.get(task, task) for task in of_digits])
    level.set_xticks([0.15], ["contrast the label\n(right: eps 1e-5)"])
    level.axhline(1 - 1 / settings.levels, color="C3", linestyle="--", label="guessing")
    for norm, color in colors.items():
        digit.bar(0, 0, 0, color=color, alpha=0.5, label=f"{norm} norm")


STUDY = Study(
    name="axis",
    title="Axis: which norm may take away what",
    source="Ba, Kiros, Hinton, *Layer Normalization*, arXiv:1607.06450; Shen et al., *PowerNorm*, arXiv:2003.07845; "
    "Ulyanov, Vedaldi, Lempitsky, *Instance Normalization*, arXiv:1607.08022; Huang, Belongie, arXiv:1703.06868",
    expected="Batch norm makes a sequence depend on the others of its batch: in a recurrent network and a Transformer "
    "layer norm does better. Instance norm takes each image's contrast away: that helps where the contrast is a "
    "nuisance, and leaves nothing to tell where it is the label.",
    full=FULL,
    quick=QUICK,
    cause="the contrast is made equal for all images",
    without_cause=dataclasses.replace(QUICK, lowest=1.0),
    conditions=conditions,
    measure=measure,
    claims=claims,
    draw=draw,
    meaning="In the recurrent network both troubles of batch norm are seen: statistics of 16 images at each step are "
    "noisy, so that it errs on the images it trains on as well; and one set of running statistics does not fit all "
    "steps: by the statistics of the 360 test images themselves, step by step, the same networks err 4.8 %, about as "
    "layer norm's. The Transformer refutes the expectation: on sequences of one length batch norm errs less with each "
    "seed. What instance norm takes away depends on its eps: with torch's 1e-5, which is not small beside the "
    "faintest images' variance and beside which weights can learn to make any variance small, it tells levels of "
    "contrast without an error.",
)
