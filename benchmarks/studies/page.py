"""The page of a study, and its plot: all that they say comes from the study's declaration and its results."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: there may be no display
from matplotlib import pyplot as plt

from .. import environment
from .study import Claim, Study, verdict

WIDTH = 120


def claims_of(result: Mapping[str, Any]) -> list[Claim]:
    """As they were judged when the study ran."""
    return [Claim(**claim) for claim in result["claims"]]


def plot(study: Study[Any, Any], result: Mapping[str, Any], settings: Any, path: Path) -> None:
    """Writes the study's figure, with its title, and a legend in each panel that has something to name."""
    figure = plt.figure(figsize=(12, 4.8))
    study.draw(settings, result["found"], figure)
    for axes in figure.axes:
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=7, loc="best")
    figure.suptitle(f"{study.title} ({result['seeds']} seeds)", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def markdown(study: Study[Any, Any], result: Mapping[str, Any]) -> str:
    """What was expected, from which paper, and what came out."""
    claims = claims_of(result)
    set_to = ", ".join(f"{name} {value}" for name, value in result["settings"].items())
    blocks = [
        f"# {study.title}",
        f"Source: {study.source}.",
        f"Expected: {study.expected}",
        f"**{verdict(claims).capitalize()}**, with {result['seeds']} seeds; figures are means over them, then the "
        "lowest and the highest.",
        _table(claims),
        f"![{study.title}]({study.name}.png)",
        f"Settings: {set_to}. {_about(study)}",
        f"Tried without its cause, on the quick setting: {study.cause}. Then the verdict is other "
        "(`tests/test_studies.py`).",
        f"From {environment.sentence(result['environment'])}. `make studies ARGS={study.name}` runs it again; all "
        f"numbers are in [{study.name}.json]({study.name}.json), its code is "
        f"[{study.name}.py](../../benchmarks/studies/{study.name}.py).",
    ]
    return (
        "\n\n".join(
            block if block[0] in "|!#" else textwrap.fill(block, WIDTH, break_long_words=False, break_on_hyphens=False)
            for block in blocks
        )
        + "\n"
    )


def _about(study: Study[Any, Any]) -> str:
    """What the study's file says at its head after its first sentence."""
    from importlib import import_module

    document = import_module(f"{__package__}.{study.name}").__doc__ or ""
    return " ".join(document.split("\n\n", 1)[-1].split())


def _table(claims: Sequence[Claim]) -> str:
    rows = [f"| {claim.expected} | {claim.found} | {'yes' if claim.holds else 'no'} |" for claim in claims]
    return "\n".join(["| expected | found | so it is |", "|---|---|---|", *rows])


def text(study: Study[Any, Any], result: Mapping[str, Any]) -> str:
    """The same for a terminal, in a few lines."""
    claims = claims_of(result)
    lines = [f"{study.name}: {verdict(claims)} ({result['seeds']} seeds)"]
    return "\n".join([*lines, *(f"  {'yes' if c.holds else 'NO '} {c.expected}: {c.found}" for c in claims)])
