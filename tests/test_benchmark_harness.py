"""The benchmark's own promises: it times only what is right, says what is missing, and counts bytes as written down."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import correctness, memory, run, selection, timing
from benchmarks.measure import Settings, measure
from benchmarks.peers import AUTOTUNED, COMPILED, EAGER, OURS, OURS_COMPILED, PEERS, Peer
from benchmarks.records import Measurement, Row, Run, Spread
from benchmarks.report import plots, text
from benchmarks.traffic import DIRECTIONS, Direction, minimal_bytes
from benchmarks.whole_models import WHOLE_MODELS
from benchmarks.workloads import FUNCTIONS, WORKLOADS, Call, Shapes, Workload, swept
from benchmarks.workloads.series import SERIES

CPU = torch.device("cpu")
EAGERLY = [peer for peer in PEERS if peer.name in (OURS, EAGER)]
(TUNED,) = [peer for peer in PEERS if peer.name == AUTOTUNED]


def settings(*peers: Peer) -> Settings:
    return Settings(CPU, "tiny", seconds=0.01, peers=peers)


def measured(row: Row, contender: str) -> Measurement:
    found = row.measurement(contender)
    assert found is not None
    return found


def rows_of(workload: Workload, *peers: Peer) -> list[Row]:
    return list(measure(workload, torch.float32, settings(*peers)))


# --- the list of workloads -----------------------------------------------------------------------------------------


def test_the_issue_s_spans_and_models_are_there() -> None:
    spans = {workload.shapes.full[-1] for workload in WORKLOADS.values() if "layer_norm_" in workload.name}
    assert {256, 65536} <= spans
    assert {workload.function for workload in WORKLOADS.values()} == set(FUNCTIONS)
    for model, hidden in {"gpt2": 768, "llama3_8b": 4096, "vit_b": 768}.items():
        of_model = [workload for workload in WORKLOADS.values() if workload.name.startswith(model)]
        assert of_model and all(workload.shapes.full[-1] == hidden for workload in of_model)
    assert any(workload.shapes.full[1] == 197 for workload in WORKLOADS.values() if workload.name.startswith("vit_b"))


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda workload: workload.name)
def test_sizes_keep_rows_or_channels_and_the_full_one_fills_a_gpu(workload: Workload) -> None:
    full, reduced, tiny = (workload.shape(size) for size in ("full", "reduced", "tiny"))
    of_images = workload.of.by_channel or (len(full) > 3 and not workload.of.norm)
    kept = 1 if of_images else -1
    assert full[kept] == reduced[kept] == tiny[kept]
    assert math.prod(tiny) <= math.prod(reduced) <= math.prod(full)
    fills = math.prod(full) * torch.bfloat16.itemsize >= 64 * 2**20
    assert fills != (workload.launch_bound or workload.fits_cache)


def test_two_workloads_of_one_name_are_refused() -> None:
    from benchmarks.workloads import _named

    twin = Workload("layer_norm_256", "layer_norm", swept(256))
    with pytest.raises(ValueError, match="unique"):
        _named(twin, twin)


def test_inputs_follow_from_the_seed() -> None:
    workload = WORKLOADS["layer_norm_residual_gelu"]
    first, again, other = (workload.case("tiny", torch.float32, CPU, seed) for seed in (1, 1, 2))
    assert list(first.inputs) == ["x", "residual", "weight", "bias"]
    assert first.parameters == {"weight", "bias"}
    for name, tensor in first.inputs.items():
        assert torch.equal(tensor, again.inputs[name])
        assert not torch.equal(tensor, other.inputs[name])


# --- bytes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "forward", "both"),
    [
        # S = 8 * 1024 * 2 bytes = 16384. Forward x, y; backward x, dy, dx.
        ("layer_norm_1024", (8, 1024), torch.bfloat16, 32768, 32768 + 49152),
        # S = 10 * 1024 * 4 = 40960, m = 10240 / 8 = 1280. Forward x, residual, y, and m where a backward follows; that
        # reads x, dy, m and writes dx, dresidual.
        ("layer_norm_residual_relu", (10, 1024), torch.float32, 122880, 122880 + 1280 + 163840 + 1280),
        # S = 2 * 3 * 4096 * 2 = 49152. Forward x, residual, total, y; backward total, dy, dtotal and one dx.
        ("llama3_8b_add_rms_norm", (2, 3, 4096), torch.bfloat16, 196608, 196608 + 196608),
        # S = 4 * 1024 * 4 = 16384. Forward x, residual, y; backward x, residual, dy, dx, dresidual.
        ("layer_norm_residual_gelu", (4, 1024), torch.float32, 49152, 49152 + 81920),
    ],
)
def test_minimal_bytes(name: str, shape: tuple[int, ...], dtype: torch.dtype, forward: int, both: int) -> None:
    assert minimal_bytes(WORKLOADS[name], shape, dtype, "forward") == forward
    assert minimal_bytes(WORKLOADS[name], shape, dtype, "forward+backward") == both


def test_the_rate_is_minimal_bytes_over_the_median() -> None:
    measurement = Measurement(OURS, "timed", seconds=Spread(0.002, 0.001, 0.003, 9))
    row = Row("w", "layer_norm", (1,), "float32", "forward", 6_000_000, measurements=[measurement])
    assert row.gigabytes_per_second(OURS) == pytest.approx(3.0)
    assert row.gigabytes_per_second("another") is None


def test_kept_bytes_are_the_distinct_storages_without_parameters() -> None:
    case = WORKLOADS["layer_norm_gelu"].case("tiny", torch.float32, CPU)

    def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        z = x * weight  # keeps x and weight
        return z * z + z.sin() + bias  # keeps z, in three places

    assert memory.kept_bytes(call, case) == 2 * case.inputs["x"].nbytes


def test_peak_bytes_count_what_lives_at_one_time() -> None:
    x = torch.ones(2**16)  # 256 KiB

    def two_at_a_time() -> torch.Tensor:
        y = x
        for _ in range(5):
            y = y + x  # the sum before is released as soon as the next is there
        return y

    assert memory.peak_bytes(two_at_a_time, CPU) == 2 * x.nbytes


# --- the gate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda workload: workload.name)
def test_ours_and_torch_pass_the_gate(workload: Workload, direction: Direction, dtype: torch.dtype) -> None:
    case = workload.case("tiny", dtype, CPU)
    expected = correctness.expect(workload, case)
    for call in (workload.ours(), workload.torch_composition()):
        verdict = correctness.check(workload, case, call, expected, direction)
        assert not verdict.reason
        assert 0 <= verdict.error <= 1


def _in_place(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    y = torch.nn.functional.layer_norm(x, weight.shape, weight, bias)
    x.detach().add_(1.0)
    return y


def _one_element_off(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    y = torch.nn.functional.layer_norm(x, weight.shape, weight, bias)
    off = torch.zeros_like(y)
    off[-1, -1] = 1e-3
    return y + off


def _no_gradient_of_the_statistics(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    rstd = torch.rsqrt(x.detach().var(-1, keepdim=True, unbiased=False) + 1e-5)
    return (x - x.detach().mean(-1, keepdim=True)) * rstd * weight + bias


WRONG = {
    "changes its inputs": _in_place,
    "y differs": _one_element_off,
    "dx differs": _no_gradient_of_the_statistics,
    "instead of": lambda x, weight, bias: torch.nn.functional.layer_norm(x, weight.shape, weight, bias).double(),
    "y differs from float64 by nan": lambda x, weight, bias: x * float("nan") + weight + bias,
    "returns 2 tensors": lambda x, weight, bias: (x * weight + bias, x * 1.0),
}


@pytest.mark.parametrize(("reason", "call"), WRONG.items())
def test_a_wrong_contender_is_reported_and_not_timed(reason: str, call: Call) -> None:
    rows = rows_of(WORKLOADS["layer_norm_1024"], *EAGERLY, Peer("wrong", lambda workload: call))
    wrong = [found for row in rows if (found := measured(row, "wrong")).status == "wrong"]
    assert wrong and reason in wrong[0].reason
    assert all(found.seconds is None and found.peak_bytes is None for found in wrong)
    assert all(measured(row, OURS).status == "timed" for row in rows)
    assert any("wrong" in line and reason in line for line in text.gaps(Run({}, rows)))


def test_a_wrong_backward_leaves_the_forward_in_the_table() -> None:
    wrong = Peer("wrong", lambda workload: _no_gradient_of_the_statistics)
    forward, both = rows_of(WORKLOADS["layer_norm_1024"], wrong)
    assert [measured(row, "wrong").status for row in (forward, both)] == ["timed", "wrong"]


def test_a_contender_is_checked_before_any_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    check, interleave = correctness.check, timing.interleave

    def noted_check(*arguments: Any) -> correctness.Verdict:
        happened.append("check")
        return check(*arguments)

    def noted_interleave(*arguments: Any) -> dict[str, list[float]]:
        happened.append("time")
        return interleave(*arguments)

    monkeypatch.setattr(correctness, "check", noted_check)
    monkeypatch.setattr(timing, "interleave", noted_interleave)
    rows_of(WORKLOADS["rms_norm_512"], *EAGERLY)
    assert happened == ["check", "check", "time"] * 2


# --- gaps ----------------------------------------------------------------------------------------------------------


def test_an_unavailable_peer_is_a_stated_gap() -> None:
    def never(workload: Workload) -> Call:
        raise AssertionError("built although unavailable")

    absent = Peer("absent", never, lambda workload, device: f"no {workload.function} on {device}")
    rows = rows_of(WORKLOADS["rms_norm_512"], *EAGERLY, absent)
    for row in rows:
        assert measured(row, "absent") == Measurement("absent", "unavailable", "no rms_norm on cpu")
        assert row.gigabytes_per_second("absent") is None
    assert text.gaps(Run({}, rows)) == ["absent: unavailable on every row: no rms_norm on cpu"]


def test_a_peer_that_raises_is_a_stated_gap() -> None:
    def broken(**inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no compiler found\nand a long trace")

    def unbuildable(workload: Workload) -> Call:
        raise ImportError("half installed")

    rows = rows_of(
        WORKLOADS["rms_norm_512"],
        *EAGERLY,
        Peer("broken", lambda workload: broken),
        Peer("unbuildable", unbuildable),
    )
    for row in rows:
        assert measured(row, "broken") == Measurement("broken", "failed", "RuntimeError: no compiler found")
        assert measured(row, "unbuildable") == Measurement("unbuildable", "failed", "ImportError: half installed")


def test_without_a_compiler_its_columns_say_so() -> None:
    def uncompilable(**inputs: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    peers = [Peer(name, lambda workload: uncompilable) for name in (COMPILED, OURS_COMPILED)]
    heading, _, first, second = text.text_table(
        Run({}, rows_of(WORKLOADS["layer_norm_1024"], *EAGERLY, *peers))
    ).splitlines()
    assert "ours/compile" in heading and "both compiled" in heading
    assert first.count("no compiler") == second.count("no compiler") == 2


def test_compiling_is_left_out_of_a_default_run_on_a_cpu_but_where_it_is_asked_for() -> None:
    compiled = Peer(OURS_COMPILED, Workload.ours, compiles=True)  # declared so, and quick
    status = {}
    for name in ("layer_norm_1024", "layer_norm_256"):
        row, _ = rows_of(WORKLOADS[name], *EAGERLY, compiled)
        status[name] = measured(row, OURS_COMPILED).status
    assert status == {"layer_norm_1024": "timed", "layer_norm_256": "skipped"}


def test_tuning_is_left_out_of_every_default_run() -> None:
    row, _ = rows_of(WORKLOADS["layer_norm_1024"], *EAGERLY, TUNED)
    assert measured(row, AUTOTUNED).status == "skipped"


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own tuning
@pytest.mark.full
def test_tuning_is_timed_where_all_is_compiled() -> None:
    settings = Settings(torch.device("cpu"), "tiny", seconds=0.0, compile_all=True, peers=(*EAGERLY, TUNED))
    forward, both = measure(WORKLOADS["layer_norm_1024"], torch.float32, settings)
    assert [measured(row, AUTOTUNED).reason for row in (forward, both)] == ["", ""]
    assert measured(forward, AUTOTUNED).status == measured(both, AUTOTUNED).status == "timed"
    assert forward.ratio(OURS, AUTOTUNED) is not None


def test_every_contender_has_a_marker_of_its_own() -> None:
    assert len(set(plots.MARKERS)) >= len(PEERS)


# --- from end to end -----------------------------------------------------------------------------------------------


def test_run_from_end_to_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--size", "tiny", "--seconds", "0.01", "--output", str(tmp_path)]
    assert run.main([*arguments, "--filter", "rms_norm_residual_silu"]) == 0
    out, err = capfd.readouterr()
    (data,) = tmp_path.glob("rows-cpu-*.jsonl")
    (plot,) = tmp_path.glob("rows-cpu-*.png")
    assert "2/2" in err  # the progress bar
    assert "rms_norm_residual_silu float32 forward:" in out
    end = out.splitlines()[-11:]
    assert "Figures from: CPU" in end[0] and str(data) in end[1] and str(plot) in end[2] and not end[3]
    assert "no GPU ran" in end[4] and end[5] == "counted, not timed" and end[-1].startswith("o/e: ours / torch eager")
    read = Run.read(data)
    assert [row.direction for row in read.rows] == ["forward", "forward+backward"]
    assert [row.direction for row in read.counted] == ["forward", "forward+backward"] and not read.uncounted
    known = {"cpu", "threads", "torch", "triton", "numpy", "python", "commit", "dirty", "allocator", "seconds"}
    assert known | {"copy_bytes_per_second", "copy_bytes_per_second_after"} <= set(read.environment)
    for row in read.rows:
        ours = measured(row, OURS)
        assert ours.status == "timed" and ours.seconds is not None
        assert ours.seconds.lower <= ours.seconds.median <= ours.seconds.upper


def test_a_filter_that_fits_nothing_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--device", "cpu", "--filter", "no such workload"]) == 1
    assert "layer_norm_256" in capsys.readouterr().out


def test_ours_being_wrong_fails_the_run() -> None:
    row = Row("w", "layer_norm", (8,), "float32", "forward", 1, measurements=[Measurement(OURS, "timed")])
    assert not run.ours_is_broken(Run({}, [row]))
    assert run.ours_is_broken(Run({}, [dataclasses.replace(row, measurements=[Measurement(OURS, "wrong", "y")])]))


def test_what_a_default_run_holds() -> None:
    cpu, gpu = (
        {w.name for w in selection.chosen(torch.device(kind), False, []) if not w.series} for kind in ("cpu", "cuda")
    )
    assert not any(WORKLOADS[name].launch_bound for name in cpu)
    assert any(WORKLOADS[name].launch_bound for name in gpu)
    assert {w.name for w in selection.chosen(CPU, True, []) if not w.series} == set(WORKLOADS)
    assert {w.series for w in selection.chosen(CPU, True, [])} == {"", *SERIES}
    assert {m.name for m in selection.chosen_models(CPU, True, [])} == set(WHOLE_MODELS)


def test_a_workload_of_another_rank_needs_no_other_code() -> None:
    shapes = Shapes((8, 4, 6, 32), (4, 4, 6, 32), (2, 2, 3, 32))
    rows = rows_of(Workload("images", "layer_norm", shapes, residual=True), *EAGERLY)
    assert [measured(row, OURS).status for row in rows] == ["timed", "timed"]
