"""Whole models in the benchmark: what fuse makes of them, the gate before the clock, and what a row of one says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import compilations, measure, measure_models
from benchmarks.measure import Settings
from benchmarks.measure_models import measure_model
from benchmarks.peers import COMPILED, EAGER, OURS, OURS_COMPILED
from benchmarks.records import MODEL
from benchmarks.whole_models import WHOLE_MODELS
from benchmarks.workloads import WORKLOADS
from fused_ops import fuse, fusion_report

pytestmark = pytest.mark.one_in(8)

CPU = torch.device("cpu")
FUSED = {
    "resnet50": {"norm+relu": 33, "norm+add+relu": 16, "norm": 4},
    "bit_resnet50": {"weight_standardize": 53, "norm+relu": 49},
    "sd_unet_blocks": {"norm+silu": 8},
    "vit_b": {"norm": 3, "add+norm": 2},
    "llama_blocks": {"norm": 3, "add+norm": 2},
    "cyclegan_generator": {"norm+relu": 6, "norm+add": 1},
}


@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_every_norm_of_it_is_fused(name: str) -> None:
    report = fusion_report(fuse(WHOLE_MODELS[name].build("tiny", torch.float32, CPU)))
    assert all(entry.fused for entry in report)
    assert Counter(entry.pattern for entry in report) == FUSED[name]


@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_it_is_timed_beside_the_author_s(name: str) -> None:
    rows = list(measure_model(WHOLE_MODELS[name], torch.float32, Settings(CPU, "tiny", seconds=0.0)))
    assert [row.direction for row in rows] == ["forward", "forward+backward"]
    for row in rows:
        assert row.function == MODEL and row.of_model and row.minimal_bytes is None
        assert row.gigabytes_per_second(OURS) is None
        status = {found.contender: found.status for found in row.measurements}
        assert status == {OURS: "timed", EAGER: "timed", COMPILED: "skipped", OURS_COMPILED: "skipped"}, row
        assert row.ratio(OURS, EAGER) is not None
    ours, eager = (rows[1].measurement(name) for name in (OURS, EAGER))
    assert ours is not None and eager is not None and ours.kept_bytes is not None and eager.kept_bytes is not None
    assert 0 < ours.kept_bytes <= eager.kept_bytes
    assert ours.first_seconds is not None and ours.first_seconds > 0


def test_a_model_that_fuse_makes_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = measure_models.fused_ops.fuse

    def wrong(model: torch.nn.Module) -> torch.nn.Module:
        fused = right(model)
        fused.register_forward_hook(lambda module, args, out: out * 1.01)
        return fused

    monkeypatch.setattr(measure_models.fused_ops, "fuse", wrong)
    for row in measure_model(WHOLE_MODELS["vit_b"], torch.float32, Settings(CPU, "tiny", seconds=0.0)):
        ours, eager = (row.measurement(name) for name in (OURS, EAGER))
        assert ours is not None and ours.status == "wrong" and ours.seconds is None and "float64" in ours.reason
        assert eager is not None and eager.status == "timed"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), RuntimeError("can't allocate memory: 9 bytes")])
def test_a_model_too_large_for_its_gate_is_a_stated_gap(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*args: object) -> None:
        raise error

    monkeypatch.setattr(measure_models, "_Gate", full)
    for row in measure_model(WHOLE_MODELS["vit_b"], torch.float32, Settings(CPU, "tiny", seconds=0.0)):
        assert {found.status for found in row.measurements} == {"unavailable"}
        assert all("no room" in found.reason and str(error) in found.reason for found in row.measurements)
        assert [found.contender for found in row.measurements] == [OURS, EAGER, COMPILED, OURS_COMPILED]


def test_a_call_of_a_gpu_takes_tensors_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many that what the one before left in the cache is of no use; of a call that fills it one is enough."""
    case = WORKLOADS["layer_norm_256"].case("tiny", torch.float32, CPU)
    gpu = torch.device("cuda")
    for cache, cases in ((case.bytes, 3), (3 * case.bytes, 7), (case.bytes // 2 - 8, 1), (10**9, 20)):
        monkeypatch.setattr(measure.timing, "cache_bytes", lambda device, cache=cache: cache)
        rotation = measure.rotation(case, gpu)
        assert len(rotation) == cases
        assert len({each.inputs["x"].data_ptr() for each in rotation}) == cases
    assert measure.rotation(case, CPU) == [case]
    taken: list[Tensor] = []
    run = measure.rotating(lambda case: taken.append(case.inputs["x"]), rotation)
    for _ in range(41):
        run()
    assert [id(x) for x in taken] == [id(rotation[index % 20].inputs["x"]) for index in range(41)]


def test_what_a_first_call_compiles_is_counted() -> None:
    torch._dynamo.reset()

    def doubled(x: Tensor) -> Tensor:
        return 2 * x

    compiled: Callable[[Tensor], Tensor] = torch.compile(doubled, backend="eager")
    x = torch.ones(3)
    seconds, count = compilations.first_call(lambda: compiled(x), CPU)
    assert seconds > 0 and count == 1
    assert compilations.first_call(lambda: compiled(x), CPU)[1] == 0
    assert compilations.first_call(lambda: doubled(x), CPU)[1] == 0
