"""Studies judge themselves: by claims that fail without their cause, on pages that hold what was found."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks.studies import STUDIES, page
from benchmarks.studies import __main__ as command
from benchmarks.studies import run as runner
from benchmarks.studies.study import (
    NOT_REPRODUCED,
    REPRODUCED,
    Claim,
    Found,
    Numbers,
    Study,
    below,
    not_above,
    over_seeds,
    values,
    verdict,
)

CPU = torch.device("cpu")
PUBLISHED = sorted(command.PUBLISHED.glob("*.json"))


@dataclasses.dataclass(frozen=True)
class Slope:
    """Of a toy study: y grows by so much from one end to the other."""

    slope: float


def measure(settings: Slope, at: int, seed: int, device: torch.device) -> Numbers:
    torch.manual_seed(seed)
    return {"y": settings.slope * at + torch.rand((), device=device).item() / 100, "threads": torch.get_num_threads()}


def claims(settings: Slope, found: Found) -> Sequence[Claim]:
    return (below("y grows", values(found, "start", "y"), values(found, "end", "y"), ".2f"),)


def conditions(settings: Slope) -> Mapping[str, int]:
    return {"start": 0, "end": 1}


def draw(settings: Slope, found: Found, figure: Figure) -> None:
    figure.subplots().plot([0, 1], [values(found, name, "y")[0] for name in ("start", "end")], label="y")


TOY: Study[Slope, int] = Study(
    name="toy", title="A slope", source="nobody", expected="y grows.", full=Slope(2.0), quick=Slope(1.0),
    cause="the slope is level", without_cause=Slope(0.0), conditions=conditions, measure=measure, claims=claims,
    draw=draw,
)  # fmt: skip


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (command, runner):
        monkeypatch.setattr(module, "STUDIES", {"toy": TOY})


def claims_with(setting: runner.Setting, name: str) -> list[Claim]:
    """As one seed bears them out."""
    (result,) = runner.run([name], setting, 1, CPU)
    return page.claims_of(result)


def test_a_run_writes_its_numbers_a_plot_and_a_page(toy: None, tmp_path: Path, capsys: Any) -> None:
    threads = torch.get_num_threads()
    assert command.main(["toy", "toy", "--jobs", "1", "--device", "cpu", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "toy.json").read_text())
    assert result["settings"] == {"slope": 2.0} and result["seeds"] == 3
    assert [one["threads"] for one in result["found"]["end"]] == [1, 1, 1]  # the same numbers as in a pool
    assert torch.get_num_threads() == threads
    text = (tmp_path / "toy.md").read_text()
    assert text.startswith("# A slope\n") and "**Reproduced** (seeds: 3)" in text and "`slope=2.0`" in text
    assert f"| y grows | {result['claims'][0]['found']} | yes |" in text
    assert (tmp_path / "toy.png").stat().st_size > 1000
    assert "| [A slope](toy.md) | 1 of 1 | reproduced |" in (tmp_path / "README.md").read_text()
    assert "toy: reproduced (seeds: 3)\n  yes y grows: 0.0" in capsys.readouterr().out


def test_what_is_not_reproduced_is_said(toy: None, tmp_path: Path, capsys: Any) -> None:
    assert command.main(["--without-cause", "--jobs", "1", "--device", "cpu", "--output", str(tmp_path)]) == 0
    assert "toy: not reproduced, its cause taken away (seeds: 3)" in capsys.readouterr().out
    text = (tmp_path / "toy.md").read_text()
    assert "**Not reproduced**, its cause taken away (seeds" in text and "| **no** |" in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["of_nothing"], "no study is called of_nothing; there are toy"),
        (["--publish", "--quick"], "--publish is for the full settings and at least 3 seeds"),
        (["--publish", "--seeds", "2"], "--publish is for the full settings and at least 3 seeds"),
        (["--publish", "--output", "here"], "not allowed with argument"),
        (["--seeds", "0"], "must be at least 1, but is 0"),
    ],
)
def test_what_cannot_be_run_is_told(toy: None, arguments: list[str], told: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert told in capsys.readouterr().err


def test_only_committed_sources_are_published(toy: None, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(command.environment, "commit", lambda: {"commit": "0" * 40, "dirty": True})
    with pytest.raises(SystemExit):
        command.main(["--publish"])
    assert "commit first" in capsys.readouterr().err


def test_a_claim_holds_with_every_seed_or_not_at_all() -> None:
    assert below("", [1, 2, 3], [2, 3, 4]).holds
    assert not below("", [1, 2, 5], [2, 3, 4]).holds
    assert not below("", [1, 2, 3], [2, 3, 4], margin=1).holds
    assert below("", [1, 2], [3, 3]).found == "1.5 (1 to 2) against 3"


def test_what_is_not_above_is_so_on_average() -> None:
    assert not_above("", [1, 5], [2, 3], margin=0.5).holds
    assert not not_above("", [1, 5], [2, 3], margin=0.4).holds


def test_a_verdict_needs_every_claim() -> None:
    true, false = Claim("", "", True), Claim("", "", False)
    assert verdict([true, true]) == REPRODUCED
    assert verdict([true, false]) == NOT_REPRODUCED
    assert over_seeds([0.1, 0.2, 0.6], ".0%") == "30% (10% to 60%)"


TURNS = {
    "degradation": ["ResNet-56 ends with no more than ResNet-20"],
    "gradient_flow": ["batch norm holds it", "instance norm holds it", "an identity path holds it, small weights"],
    "shattered_gradients": ["near brown noise's with 50 residual layers"],
    "batch_size": ["batch norm errs more at 2 images than at 16", "at 2 group norm errs less than batch norm"],
    "remedies": ["bare: does not learn"],
    "axis": ["where the contrast is a nuisance instance norm errs less", "and batch norm does not"],
    "switch_weights": ["batch has less of a share with"],
}
"""Which claims hold on the quick settings, and without the cause do not, by how the first that begins so does."""
FAST = ("gradient_flow", "shattered_gradients", "axis")  # the others take 10 to 60 seconds


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.full) for name in STUDIES]
)
def test_without_its_cause_the_verdict_is_another(name: str) -> None:
    assert verdict(claims_with("quick", name)) == REPRODUCED
    without = claims_with("without_cause", name)
    assert verdict(without) == NOT_REPRODUCED
    for beginning in TURNS[name]:
        claim = next(claim for claim in without if claim.expected.startswith(beginning))
        assert not claim.holds, claim


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_page_says_what_its_numbers_say(path: Path) -> None:
    result, study = json.loads(path.read_text()), STUDIES[path.stem]
    assert result["setting"] == "full" and result["seeds"] >= 3 and not result["environment"]["dirty"]
    assert result["settings"] == json.loads(json.dumps(dataclasses.asdict(study.full)))
    judged = study.claims(study.full, result["found"])
    assert [dataclasses.asdict(claim) for claim in judged] == result["claims"]
    assert path.with_suffix(".md").read_text() == page.markdown(study, result, path.parent)
    assert path.with_suffix(".png").stat().st_size > 1000


def test_the_index_has_every_study_and_its_verdict() -> None:
    results = {path.stem: json.loads(path.read_text()) for path in PUBLISHED}
    assert list(results) == sorted(STUDIES)
    assert (command.PUBLISHED / "README.md").read_text() == page.index(STUDIES, results, command.PUBLISHED)
