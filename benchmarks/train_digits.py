"""`python -m benchmarks.train_digits`: real training, with torch.nn and with fused_ops.

A small model (--model vit or resnet18) learns scikit-learn's handwritten digits twice from the same parameters, on the
same batches in the same order. Shown are both loss curves, which coincide to rounding, the accuracy on digits not
trained on, and the time of a step; a plot and the numbers go to benchmarks/results/local/.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as TF
from torch import Tensor, nn
from tqdm import tqdm

from . import environment, timing
from .digits import batches, digits
from .models import MODELS
from .records import Spread
from .report.text import milliseconds

BATCH = 128
FIRST_STEPS = 20
"""Later a difference of rounding has been amplified by as many updates, and tells little of the step it arose in."""
PLAIN, FUSED = "torch.nn", "fused_ops"


@dataclass
class Student:
    """A model in training and what became of it so far."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One batch: forward, backward, update."""
        started = time.perf_counter()
        loss = TF.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())  # waits for the device
        self.seconds.append(time.perf_counter() - started)

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of images that are told right."""
        self.model.eval()
        right = self.model(images).argmax(1) == labels
        self.model.train()
        return right.float().mean().item()


def train(model: str, steps: int, device: torch.device, seed: int = 0) -> dict[str, Any]:
    """Trains both twins step by step side by side, in an order that alternates, and returns what is to be shown."""
    twins = MODELS[model]
    students = {}
    for name, network in zip((PLAIN, FUSED), twins.build(seed), strict=True):
        network.to(device)
        optimizer = twins.optimizer(network.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        students[name] = Student(network, optimizer, schedule)
    (images, labels), test = digits(device)
    order = [PLAIN, FUSED]
    for batch in tqdm(batches(len(labels), steps, seed, BATCH), total=steps, unit="step"):
        chosen = batch.to(device)
        for name in order:
            students[name].step(images[chosen], labels[chosen])
        order.reverse()
    losses = {name: student.losses for name, student in students.items()}
    differences = [abs(a - b) for a, b in zip(losses[PLAIN], losses[FUSED], strict=True)]
    return {
        "model": model,
        "parameters": sum(parameter.numel() for parameter in students[PLAIN].model.parameters()),
        "losses": losses,
        "largest_difference": max(differences),
        "largest_first_difference": max(differences[:FIRST_STEPS]),
        "accuracy": {name: student.accuracy(*test) for name, student in students.items()},
        "step_seconds": {name: vars(Spread.of(student.seconds)) for name, student in students.items()},
    }


def summary(result: dict[str, Any]) -> str:
    """What was trained, and how long."""
    steps = len(result["losses"][PLAIN])
    return f"{result['model']}, {result['parameters']} parameters, {steps} steps of {BATCH} images"


def describe(result: dict[str, Any]) -> str:
    """Both curves side by side, and the rest in a line each."""
    plain, fused = (result["losses"][name] for name in (PLAIN, FUSED))
    shown = sorted({*range(0, len(plain), max(1, len(plain) // 10)), len(plain) - 1})
    lines = [
        summary(result),
        f"{'step':>6}  {'loss, ' + PLAIN:>16}  {'loss, ' + FUSED:>16}  {'difference':>10}",
        *(f"{i:6d}  {plain[i]:16.6f}  {fused[i]:16.6f}  {fused[i] - plain[i]:10.1e}" for i in shown),
        f"largest difference of the losses: {result['largest_difference']:.2g}, "
        f"of the first {min(FIRST_STEPS, len(plain))}: {result['largest_first_difference']:.2g}",
    ]
    accuracy, seconds = result["accuracy"], result["step_seconds"]
    lines.append("accuracy on the test images: " + ", ".join(f"{name} {accuracy[name]:.2%}" for name in accuracy))
    steps = (
        f"{name} {milliseconds(spread['median'])} ms ({milliseconds(spread['lower'])}-{milliseconds(spread['upper'])})"
        for name, spread in seconds.items()
    )
    ratio = seconds[FUSED]["median"] / seconds[PLAIN]["median"]
    lines.append(f"time of a step: {', '.join(steps)}; {FUSED} / {PLAIN} {ratio:.2f}")
    return "\n".join(lines)


def draw(result: dict[str, Any], title: str, path: Path) -> None:
    """Both curves in one plot, their difference below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plain, fused = (result["losses"][name] for name in (PLAIN, FUSED))
    figure, (curves, difference) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, height_ratios=(3, 1))
    curves.set_title(summary(result), fontsize=10)
    curves.plot(plain, color="C1", linewidth=4, alpha=0.5, label=PLAIN)
    curves.plot(fused, color="C0", linewidth=1, label=FUSED)
    curves.set_yscale("log")
    curves.set_ylabel("training loss")
    curves.legend()
    difference.plot([b - a for a, b in zip(plain, fused, strict=True)], color="black", linewidth=0.8)
    if plain == fused:
        difference.set_ylim(-1, 1)  # matplotlib's own limits would make a scale out of nothing
        difference.set_yticks([0])
        difference.annotate("the same to the last bit", (0.5, 0.75), xycoords="axes fraction", ha="center", va="center")
    difference.set_ylabel(f"{FUSED} - {PLAIN}", fontsize=8)
    difference.set_xlabel("step")
    for axes in (curves, difference):
        axes.grid(color="0.9")
    figure.suptitle(title.replace("; ", "\n", 1), fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, prints, writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_digits", description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), default="vit", help="default %(default)s")
    parser.add_argument("--steps", type=int, default=330, help="batches; 11 are an epoch (default %(default)s)")
    parser.add_argument("--device", help="cpu or cuda; the GPU if there is one")
    parser.add_argument(
        "--output", type=Path, default=environment.LOCAL_RESULTS, help="folder of the JSON and the plot"
    )
    options = parser.parse_args(arguments)
    device = environment.pick_device(options.device)
    described = environment.describe(device)
    if device.type == "cpu":
        described["allocator"] = timing.keep_freed_memory()
    result = train(options.model, options.steps, device)
    json_path = options.output / f"digits-{options.model}-{environment.stamp(described)}.json"
    json_path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps({"environment": described, **result}, indent=1) + "\n")
    plot_path = json_path.with_suffix(".png")
    draw(result, environment.sentence(described), plot_path)
    print(describe(result))
    print(f"Figures from: {environment.sentence(described)}.\nFull data: {json_path}\nPlot:      {plot_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
