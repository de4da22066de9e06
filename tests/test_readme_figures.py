"""Every figure of the README's tables stands in a results file."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks.peers import COMPILED, EAGER, OURS, liger
from benchmarks.records import Row, Run
from benchmarks.traffic import DIRECTIONS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
FORWARD, BOTH = DIRECTIONS
OVER = (EAGER, COMPILED, liger.NAME)


def table(heading: str) -> list[list[str]]:
    """The cells of the rows under a heading's line."""
    lines = README[README.index(heading) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def rounds_to(value: float | None, shown: str) -> bool:
    """Whether a value is what is shown, with so many decimals; "-" and nothing are no value."""
    if shown in ("", "-"):
        return value is None
    half = 0.5 * 10.0 ** -len(shown.partition(".")[2])
    return value is not None and abs(value - float(shown)) <= half * 1.001


def milliseconds(row: Row) -> float | None:
    found = row.measurement(OURS)
    return None if found is None or found.seconds is None else found.seconds.median * 1e3


def over(row: Row, contender: str) -> float | None:
    ratio = row.ratio(OURS, contender)
    return None if ratio is None else ratio.of_medians


def calls(run: Run) -> list[tuple[Row, Row]]:
    """The rows forward, and forward and backward, of each call."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in run.rows:
        found.setdefault((row.workload, row.dtype), {})[row.direction] = row
    return [(rows[FORWARD], rows[BOTH]) for rows in found.values() if len(rows) == 2]


@pytest.fixture(scope="module")
def h200() -> Run:
    return Run.read(RESULTS / "h200-default.jsonl")


def shows(rows: Sequence[Row], cell: str, read: Callable[[Row], float | None]) -> bool:
    shown = [part.strip() for part in cell.split(",")] if cell else ["", ""]
    return all(rounds_to(read(row), figure) for row, figure in zip(rows, shown, strict=True))


MEASURED = "| call | ours, ms | / torch eager |"


@pytest.mark.parametrize("line", table(MEASURED), ids=lambda line: line[0])
def test_a_line_of_what_was_measured_is_a_row_of_the_results(line: list[str], h200: Run) -> None:
    _, ours, *ratios = line
    read = (milliseconds, *(functools.partial(over, contender=contender) for contender in OVER))
    cells = list(zip((ours, *ratios), read, strict=True))
    found = [pair[0].workload for pair in calls(h200) if all(shows(pair, cell, of) for cell, of in cells)]
    assert len(found) == 1, found


def test_the_sentences_count_what_the_results_hold(h200: Run) -> None:
    found = {name: [ratio for row in h200.rows if (ratio := over(row, name)) is not None] for name in OVER}
    below = {name: sum(ratio < 1 for ratio in ratios) for name, ratios in found.items()}
    near = {name: sum(ratio <= 1.05 for ratio in ratios) for name, ratios in found.items()}
    text = " ".join(README.split())
    eager, compiled, of_liger = OVER
    assert below[eager] == len(found[eager]) == len(h200.rows)
    assert f"Against torch eager all {below[eager]} rows measured are below 1" in text
    assert f"(dynamic=False) {below[compiled]}, and {near[compiled]} at most 1.05" in text
    liger_counts = f"{below[of_liger]} of its {len(found[of_liger])}, and {near[of_liger]} at most 1.05"
    assert f"against Liger {liger_counts}" in text


def test_pythons_share_on_the_gpus_machine_is_in_the_results(h200: Run) -> None:
    measured = [row.measurement(OURS) for _, row in calls(h200)]
    host = [found.host_seconds.median * 1e6 for found in measured if found is not None and found.host_seconds]
    least, most = (float(figure) for figure in re.findall(r"forward and backward, (\d+) to (\d+) us", README)[0])
    assert abs(min(host) - least) <= 5 and abs(max(host) - most) <= 5


COUNTED = "| bfloat16, forward + backward | launches, ours / eager |"


@pytest.mark.parametrize("line", table(COUNTED), ids=lambda line: line[0])
def test_a_line_of_what_was_counted_is_a_row_of_the_results(line: list[str]) -> None:
    call, launches, moved = line
    function, shape = re.findall(r"`(\w+)`", call)[0], call.rpartition(", ")[2]
    run = Run.read(RESULTS / "amd-epyc-2026-11-28.jsonl")
    found = [
        row.workload
        for row in run.counted
        if row.direction == BOTH
        and function in row.function
        and shape in (" x ".join(map(str, of)) for of in (row.shape, (math.prod(row.shape[:-1]), row.shape[-1])))
        and f"{row.ours.launches} / {row.eager.launches}" == launches
        and rounds_to(row.ours.moved_bytes / row.eager.moved_bytes, moved)
    ]
    assert len(found) == 1, found


def test_pythons_part_of_a_call_is_in_the_results() -> None:
    file = "amd-epyc-2026-11-27-python.json"
    rows = json.loads((RESULTS / file).read_text(encoding="utf-8"))["rows"]

    def extent(of: Callable[[str], bool], read: Callable[[dict[str, float]], float], figure: str) -> list[str]:
        """The least and the most, forward, and forward and backward; one figure where they show the same."""
        shown = []
        for direction in DIRECTIONS:
            found = [read(row["host"]) for row in rows if row["direction"] == direction and of(row["workload"])]
            shown.append(" to ".join(dict.fromkeys(format(value, figure) for value in (min(found), max(found)))))
        return shown

    def of_norm(name: str) -> bool:
        return "residual_add" not in name

    def bare(name: str) -> bool:
        return name in ("layer_norm_1024", "llama3_8b_rms_norm")

    def gelu(name: str) -> bool:
        return "gelu" in name

    def beside(name: str) -> bool:
        return of_norm(name) and not bare(name) and not gelu(name)

    forward, both = extent(of_norm, lambda host: host["ours"] * 1e6, ".0f")
    of_gelu, of_beside, of_bare = (
        " and ".join(extent(of, lambda host: host["ours"] / host["eager"], ".1f")) for of in (gelu, beside, bare)
    )
    sentences = (
        f"(benchmarks/results/{file})): {forward} us forward and {both} us forward + backward. That is {of_gelu} times "
        f"what torch's chain takes with gelu, {of_beside} times with an add, relu or silu beside the norm, {of_bare} "
        "times what a bare norm takes, which is one C++ operator."
    )
    assert sentences in " ".join(README.split())


def test_what_the_digits_taught_is_in_the_results() -> None:
    runs = [
        json.loads((RESULTS / f"amd-epyc-2026-11-27-digits-{model}.json").read_text(encoding="utf-8"))
        for model in ("vit", "resnet18")
    ]
    accuracies = []
    for found in runs:
        assert found["largest_difference"] == 0 and not found["environment"]["dirty"]
        (steps,) = {len(losses) for losses in found["losses"].values()}
        assert steps == 330
        (accuracy,) = set(found["accuracy"].values())
        accuracies.append(f"{accuracy:.1%}".replace("%", " %"))
    vit, resnet = accuracies
    text = " ".join(README.split())
    assert f"over {steps} steps, and both twins ended at {vit} (ViT) and {resnet} (ResNet) test accuracy" in text
