"""What becomes of a run: lines of JSON, tables, plots, a page, a comparison with another, and a published copy."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import compare, publish
from benchmarks.measure import Settings, measure
from benchmarks.measure_models import measure_model
from benchmarks.peers import EAGER, OURS, PEERS, Peer
from benchmarks.records import CountedRow, Counts, Measurement, Ratio, Row, Run, Spread
from benchmarks.report import page, text
from benchmarks.whole_models import WHOLE_MODELS
from benchmarks.workloads import WORKLOADS, Call, Workload
from benchmarks.workloads.series import SERIES

CPU = torch.device("cpu")
EAGERLY = [peer for peer in PEERS if peer.name in (OURS, EAGER)]
ENVIRONMENT = {
    "device": "cpu",
    "device_name": "a CPU",
    "cores": 2,
    "threads": 2,
    "load_average": 0.1,
    "torch": "2.13",
    "triton": None,
    "python": "3.11",
    "fused_ops": "0.1.0",
    "commit": "0123456789abcdef",
    "dirty": False,
    "time": "2026-11-26T10:00:00+00:00",
    "copy_bytes_per_second": 2e10,
    "copy_bytes_per_second_after": 1.9e10,
}


def settings(*peers: Peer, seconds: float = 0.01) -> Settings:
    return Settings(CPU, "tiny", seconds=seconds, peers=peers)


@functools.cache
def run_of_all_kinds() -> Run:
    """Of calls, a model and a curve, on an idle device of no name."""
    few = settings(*EAGERLY)
    calls = list(measure(WORKLOADS["layer_norm_residual_relu"], torch.float32, few))
    model = list(measure_model(WHOLE_MODELS["vit_b"], torch.float32, few))
    curve = [
        row for point in SERIES["layer_norm + gelu"][:2] for row in measure(point, torch.float32, settings(*EAGERLY))
    ]
    counts = Counts(1, 2**20, None)
    counted = CountedRow("counted", "layer_norm", (8, 8), "bfloat16", "forward", counts, counts)
    return Run(ENVIRONMENT, [*calls, *model, *curve], [counted])


# --- lines of JSON -------------------------------------------------------------------------------------------------


def test_a_run_survives_being_written(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run_of_all_kinds().write(path)
    assert Run.read(path) == run_of_all_kinds()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run"] + 8 * ["row"] + ["counted"]
    (key,) = {line["run"] for line in lines}
    assert all(part in key for part in ("a CPU", "2.13", "0123456789abcdef", "2026-11-26"))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (json.dumps({"schema": 1, "rows": []}), "schema 2, but has 1"),
        ("a line of text", "the lines of a run"),
        ("", "the lines of a run"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=complaint):
        Run.read(path)


def test_lines_of_two_runs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run_of_all_kinds().write(path)
    text = path.read_text()
    path.write_text(text + text.splitlines()[1].replace("a CPU", "another"))
    with pytest.raises(ValueError, match="one run"):
        Run.read(path)


# --- tables --------------------------------------------------------------------------------------------------------


def test_a_summary_has_a_table_of_each_part() -> None:
    summary = text.summary(run_of_all_kinds())
    for heading in ("Calls", "Whole models", "Over sizes: layer_norm + gelu"):
        assert f"\n{heading}\n" in f"\n{summary}"
    titles = summary.splitlines()[1]
    assert all(
        title in titles for title in ("ours ms", "GB/s", "of copy", "ours/eager", "peak MiB o/e", "kept MiB o/e")
    )
    assert max(map(len, text.text_table(run_of_all_kinds(), run_of_all_kinds().calls).splitlines())) <= 160
    assert summary.splitlines()[-1].startswith("Figures from: CPU a CPU, threads 2 of 2 cores")
    assert "a copy moves 20 GB/s" in summary and "95% of its rate" in summary
    markdown = text.markdown_table(run_of_all_kinds()).splitlines()
    assert len(markdown) == 2 + 8 and len({line.count("|") for line in markdown}) == 1


def test_rows_above_the_limit_are_named() -> None:
    def row(name: str, of_medians: float) -> Row:
        return Row(name, "layer_norm", (8, 8), "float32", "forward", 1, ratios=[Ratio(OURS, EAGER, of_medians)])

    (line,) = text.verdicts(Run({}, [row("slow", 1.2), row("equal", 1.0), row("just", 1.054)]))
    assert "at most 1.05 on 2 of 3 rows" in line and line.endswith("above on slow float32 forward 1.20")


# --- the page ------------------------------------------------------------------------------------------------------


def test_the_page_holds_all_of_it_and_asks_the_network_for_nothing(tmp_path: Path) -> None:
    written = page.write(run_of_all_kinds(), tmp_path)
    assert [path.name for path in written] == ["index.html", "report.md", "calls.png", "sizes.png", "memory.png"]
    for path in written[2:]:
        assert path.read_bytes().startswith(b"\x89PNG")
    html = written[0].read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", html)
    assert html.count("data:image/png;base64,") == 3 and html.count("<table>") == 5
    for row in run_of_all_kinds().rows:
        assert f">{row.workload}<" in html
    assert re.search(r'class=" (faster|even|slower)"', html)
    markdown = written[1].read_text()
    assert all(f"({path.name})" in markdown for path in written[2:])


def test_the_page_says_why_rows_are_missing_and_escapes_what_it_says(tmp_path: Path) -> None:
    gap = Measurement("a peer", "failed", "<b> & more")
    row = Row("w", "layer_norm", (8, 8), "float32", "forward", 1, measurements=[gap])
    html = page.write(Run(ENVIRONMENT, [row], [], "no triton"), tmp_path)[0].read_text()
    assert "Not counted: no triton" in html and "&lt;b&gt; &amp; more" in html and "<b>" not in html


def test_a_run_of_one_kind_of_row_makes_a_page_too(tmp_path: Path) -> None:
    for rows in (run_of_all_kinds().calls, run_of_all_kinds().models, run_of_all_kinds().series["layer_norm + gelu"]):
        assert page.write(Run(ENVIRONMENT, rows), tmp_path)[0].read_text()


# --- comparing -----------------------------------------------------------------------------------------------------


def slept(workload: Workload) -> Call:
    ours = workload.ours()

    def call(**arguments: Tensor) -> Tensor | tuple[Tensor, ...]:
        time.sleep(0.002)
        return ours(**arguments)

    return call


def test_a_sleep_in_ours_is_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {}
    for name, build in {"as it is": Workload.ours, "slept": slept, "again": Workload.ours}.items():
        peers = (Peer(OURS, build), *(peer for peer in EAGERLY if peer.name == EAGER))
        rows = measure(WORKLOADS["layer_norm_residual_relu"], torch.float32, settings(*peers, seconds=0.1))
        paths[name] = tmp_path / f"{name}.jsonl"
        Run(ENVIRONMENT, list(rows)).write(paths[name])
    assert compare.main([str(paths["as it is"]), str(paths["slept"])]) == 1
    out = capsys.readouterr().out
    assert "Slower on 2: layer_norm_residual_relu float32 forward" in out
    assert compare.main([str(paths["slept"]), str(paths["again"])]) == 0
    assert "Faster on 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ours", "eager", "verdict"),
    [(1.2, 1.0, "slower"), (0.8, 1.0, "faster"), (1.2, 1.2, ""), (1.0, 1.3, "faster"), (1.04, 1.0, "")],
)
def test_a_machine_that_is_slower_as_a_whole_is_no_regression(ours: float, eager: float, verdict: str) -> None:
    def run(ours: float, eager: float) -> Run:
        spreads = {
            name: Spread(median, 0.999 * median, 1.001 * median, 100)
            for name, median in {OURS: ours, EAGER: eager}.items()
        }
        measurements = [Measurement(name, "timed", seconds=spread) for name, spread in spreads.items()]
        return Run(ENVIRONMENT, [Row("w", "layer_norm", (8, 8), "float32", "forward", 1, measurements=measurements)])

    (change,) = compare.compare(run(1.0, 1.0), run(ours, eager))
    assert change.verdict == verdict


def test_noise_is_no_regression() -> None:
    def run(median: float) -> Run:
        noisy = Measurement(OURS, "timed", seconds=Spread(median, 0.5 * median, 1.5 * median, 16))
        return Run(ENVIRONMENT, [Row("w", "layer_norm", (8, 8), "float32", "forward", 1, measurements=[noisy])])

    (change,) = compare.compare(run(1.0), run(1.4))
    assert change.verdict == ""


def test_a_row_that_broke_is_a_regression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for name, ours in {
        "a": Measurement(OURS, "timed", seconds=Spread(1.0, 1.0, 1.0, 9)),
        "b": Measurement(OURS, "wrong", "y"),
    }.items():
        row = Row("w", "layer_norm", (8, 8), "float32", "forward", 1, measurements=[ours])
        paths.append(str(tmp_path / f"{name}.jsonl"))
        Run(ENVIRONMENT, [row]).write(Path(paths[-1]))
    assert compare.main(paths) == 1
    assert "w float32 forward is broken in B." in capsys.readouterr().out
    assert compare.main(paths[::-1]) == 0


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["", "no json", "3", "{}", '{"schema": 2}', '{"schema": 2, "run": "a"}\n{"run": "a"}'])
def test_what_is_no_run_is_told_so(held: str, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(held)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Run.read(path)


def test_a_write_that_is_cut_off_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.jsonl"
    Run(ENVIRONMENT, []).write(path)
    before = path.read_bytes()

    def cut_off(self: Path, text: str) -> int:
        self.write_bytes(text.encode()[:7])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run_of_all_kinds().write(path)
    assert path.read_bytes() == before


# --- publishing ----------------------------------------------------------------------------------------------------


def test_a_published_run_is_named_by_device_and_date(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run_of_all_kinds().write(path)
    written = publish.publish(path, tmp_path / "results")
    names = ["a-cpu-2026-11-26.jsonl", *(f"a-cpu-2026-11-26-{what}.png" for what in ("calls", "sizes", "memory"))]
    assert [each.name for each in written] == names
    assert sorted(each.name for each in (tmp_path / "results").iterdir()) == sorted(names)
    assert Run.read(written[0]) == run_of_all_kinds()
    with pytest.raises(ValueError, match="there already"):
        publish.publish(path, tmp_path / "results")


def test_a_run_of_changed_sources_is_published_on_demand_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    dataclasses.replace(run_of_all_kinds(), environment={**ENVIRONMENT, "dirty": True}).write(path)
    with pytest.raises(ValueError, match="commit first"):
        publish.publish(path, tmp_path / "results")
    assert publish.publish(path, tmp_path / "results", despite_changes=True)
