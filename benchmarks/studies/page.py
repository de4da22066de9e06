"""The page of a study, and its plot: all that they say comes from the study's declaration and its results."""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

matplotlib.use("Agg")  # files only: there may be no display
from matplotlib import pyplot as plt

from .. import environment
from .study import Claim, Study, verdict

PAGE = jinja2.Template(
    """\
# {{ study.title }}

**Source.** {{ study.source }}.

**Expected.** {{ study.expected }}

**{{ verdict | capitalize }}**{{ setting }} (seeds: {{ result.seeds }}). Figures: means over them (lowest to highest).

| expected | found | holds |
|---|---|---|
{% for claim in claims -%}
| {{ claim.expected }} | {{ claim.found }} | {{ "yes" if claim.holds else "**no**" }} |
{% endfor %}
![{{ study.title }}]({{ study.name }}.png)

{% if study.meaning %}**What it means.** {{ study.meaning }}

{% endif %}**Settings.** {{ about }}

`{{ settings }}`

**Its cause taken away** ({{ study.cause }}), the verdict turns on the quick settings from reproduced to not reproduced:
`tests/test_studies.py` tries it.

**From** {{ machine }}. Again: `make studies ARGS={{ study.name }}`. All numbers:
[{{ study.name }}.json]({{ study.name }}.json). Code: [{{ study.name }}.py]({{ code }}).
""",
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
)


INDEX = jinja2.Template(
    """\
# Studies

What normalization and identity paths do to gradients: experiments on the package's own modules, each with what was
expected, its source, what came out, and a plot. `make studies` runs them all, `make studies ARGS="NAME --quick"` one of
them in less than a minute, as far as it comes out in so little time. Data, where there are any, are scikit-learn's
handwritten digits. [Which norm?]({{ which_norm }}) draws conclusions.

| study | claims that hold | verdict |
|---|---|---|
{% for title, link, holding, claims, verdict in rows -%}
| [{{ title }}]({{ link }}) | {{ holding }} of {{ claims }} | {{ verdict }} |
{% endfor %}""",
    undefined=jinja2.StrictUndefined,
)


def index(studies: Mapping[str, Study[Any, Any]], results: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """All studies of which there are results, and their verdicts, for a page in this folder."""
    rows = []
    for name, study in studies.items():
        if name in results:
            claims = claims_of(results[name])
            judged = verdict(claims) + _setting(results[name])
            rows.append((study.title, f"{name}.md", sum(claim.holds for claim in claims), len(claims), judged))
    return INDEX.render(rows=rows, which_norm=_link(environment.ROOT / "docs" / "which-norm.md", folder))


def markdown(study: Study[Any, Any], result: Mapping[str, Any], folder: Path) -> str:
    """What was expected, from which paper, and what came out: a page in this folder."""
    claims = claims_of(result)
    head = inspect.getdoc(inspect.getmodule(study.measure)) or ""
    return PAGE.render(
        study=study,
        result=result,
        verdict=verdict(claims),
        setting=_setting(result),
        claims=claims,
        about=head.split("\n\n", 1)[-1],
        settings=", ".join(f"{name}={json.dumps(value)}" for name, value in result["settings"].items()),
        machine=environment.sentence(result["environment"]),
        code=_link(Path(inspect.getfile(study.measure)), folder),
    )


def _setting(result: Mapping[str, Any]) -> str:
    """Of what is not whole."""
    return {"full": "", "quick": ", on the quick settings", "without_cause": ", its cause taken away"}[
        result["setting"]
    ]


def _link(target: Path, folder: Path) -> str:
    return Path(os.path.relpath(target, folder)).as_posix()


def as_json(result: Mapping[str, Any]) -> str:
    """An entry a line, a list of numbers in one; what diverged is NaN, as Python's json reads it again."""
    lines = json.dumps(result, indent=1) + "\n"
    return re.sub(r"\[[^][{}]*\]", lambda numbers: " ".join(numbers[0].split()), lines)


def text(study: Study[Any, Any], result: Mapping[str, Any]) -> str:
    """The same for a terminal, in a few lines."""
    claims = claims_of(result)
    lines = [f"{study.name}: {verdict(claims)}{_setting(result)} (seeds: {result['seeds']})"]
    return "\n".join([*lines, *(f"  {'yes' if c.holds else 'NO '} {c.expected}: {c.found}" for c in claims)])


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
    figure.suptitle(f"{study.title} (seeds: {result['seeds']})", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
