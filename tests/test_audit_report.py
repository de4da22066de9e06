"""What an audit prints, writes and ends with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed, so there is nothing to audit")

from benchmarks.audit import report, run
from benchmarks.audit.assembly import CodeSize
from benchmarks.audit.binary import CompiledLaunch
from benchmarks.audit.estimate import Estimate
from benchmarks.audit.findings import Finding
from benchmarks.audit.host import HostTime
from benchmarks.audit.report import Audit
from benchmarks.audit.rows import AuditRow, LaunchRow
from benchmarks.audit.sweep import Spill
from benchmarks.environment import ROOT

MIB = 2**20
ENVIRONMENT = {"time": "2026-01-01T00:00:00+00:00", "device": "cpu", "device_name": "a CPU"}
FINDING = Finding("gpt2_layer_norm bfloat16 sm_90 forward", "some_kernel", "spills", "8 bytes a thread", "none")
SPILL = Spill("rms_norm, span 16384, float16", "sm_80", "some_kernel", 128, 8)


def launch(kernel: str, registers: int, loads: int) -> CompiledLaunch:
    """132 programs of 128 threads, four at a time on a multiprocessor, with so many 16-byte loads in flight."""
    return CompiledLaunch(
        kernel,
        528,
        4,
        128,
        registers,
        0,
        0,
        4,
        {16: loads, 2: 1},
        0,
        1,
        16 * loads,
        0.0,
        False,
        CodeSize(9, 16, 0, 0),
        "",
    )


def row() -> AuditRow:
    estimates = Estimate(9e-6, 2e-6, 1e-6, 1e-6), Estimate(1e-6, 2e-6, 1e-6, 4e-6)
    launches = [
        LaunchRow(launch("large_kernel", 64, 4), 4 * MIB, 6 * MIB, 9.5, estimates[0]),
        LaunchRow(launch("column_sum_kernel", 99, 1), 1 * MIB, 1 * MIB, 0.25, estimates[1]),
    ]
    names = ("w", "layer_norm", (8, 4), "bfloat16", "forward+backward", "sm_90", "H200")
    return AuditRow(*names, launches, 4.0 * MIB, 1, HostTime(20e-6, 10e-6))


def test_a_row_adds_its_launches_up() -> None:
    """Moved 4 and 1 of a least of 4 MiB; asked for 6 and 1; 4 programs of 128 threads with 64 bytes: 32 KiB in flight;
    10 and 6 us. Registers, widths and flight are those of the launch that touches tensors of x's size."""
    heading, _, cells = report.text(report.columns([row()]), [row()]).splitlines()
    assert "moved MiB  / least  asked / moved" in heading and "estimate us  by" in heading
    assert " ".join(cells.split()) == "w 8x4 fwd+bwd 2 5.00 1.25 1.40 9.8 64 0 97% 32 1 20 2.00 16.0 memory"


def test_a_failing_audit_names_what_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    for found in ({"findings": [FINDING]}, {"spills": [SPILL]}, {}):
        audit = Audit(ENVIRONMENT, [row()], **{"findings": [], "spills": [], **found}, swept=3)
        monkeypatch.setattr(run, "perform", lambda *arguments, audit=audit: audit)
        assert run.main(["--output", str(tmp_path)]) == (1 if found else 0)
        printed = capsys.readouterr().out
        assert ("Every allowance holds." in printed) == (not found)
        assert all(str(each) in printed for group in found.values() for each in group)
    assert str(FINDING).endswith("some_kernel: spills: 8 bytes a thread, allowed none")


def test_a_filter_that_fits_nothing_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--filter", "no such workload"]) == 1
    assert "layer_norm_256" in capsys.readouterr().out


def test_the_command_from_end_to_end(tmp_path: Path) -> None:
    options = ["--only", "--filter", "gpt2_decode_add_layer_norm", f"--output={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.audit", *options], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[1].split()[:3] == ["workload", "shape", "pass"]
    assert lines[3].startswith("gpt2_decode_add_layer_norm  8x1x768  fwd")
    assert lines[-2] == "Every allowance holds."
    assert "3/3" in done.stderr  # the progress bar
    (path,) = tmp_path.glob("audit-*.json")
    forward, both = json.loads(path.read_text())["rows"]
    # bfloat16 [8, 768]: S = 12288 bytes, a parameter 1536, a statistic 32; eight programs write a row of each partial
    # sum, 3072 bytes, and read it again.
    assert forward["moved_bytes"] == 4 * 12288 + 2 * 1536
    backward = (4 * 12288 + 1536 + 2 * 32 + 2 * 8 * 3072) + (2 * 8 * 3072 + 2 * 1536)
    assert both["moved_bytes"] == forward["moved_bytes"] + 2 * 32 + backward
    assert [launch["compiled"]["kernel"] for launch in both["launches"]] == [
        "row_norm_forward_kernel",
        "row_norm_backward_kernel",
        "column_sum_kernel",
    ]
