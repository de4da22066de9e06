"""The part of `make audit` that `make test` has: a workload of each kind holds its allowances as compiled."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.audit import findings, jobs
from benchmarks.audit.host import host_time
from benchmarks.audit.targets import DEVICE_OF
from benchmarks.workloads import WORKLOADS, elements

# Short rows, whole ones with everything beside them, a stream, and rows that are walked and shared.
FEW = (
    "layer_norm_256",
    "layer_norm_residual_gelu",
    "layer_norm_residual_relu",
    "add_rms_norm_8192",
    "layer_norm_65536",
)
CHANNELS = (
    "sd_unet_2560_group_norm",
    "sd_unet_320_group_norm_channels_last",
    "bit_2048_group_norm",
    "cyclegan_256_instance_norm_residual",
)
SUMS = ("resnet50_256x56_residual_add_relu", "convnext_768x7_residual_add_layer_scale")
CASES = [
    *((name, "bfloat16", "sm_90") for name in FEW),
    *(("layer_norm_residual_gelu", "float32", target) for target in ("sm_80", "sm_90", "sm_100", "gfx942")),
    *(("add_rms_norm_32768", "bfloat16", target) for target in ("sm_80", "sm_100", "gfx942")),
    *((name, "bfloat16", target) for name in CHANNELS for target in ("sm_90", "gfx942")),
    *((name, "bfloat16", target) for name in SUMS for target in ("sm_90", "sm_100")),
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("name", "dtype", "target"), CASES, ids=["-".join(case) for case in CASES])
def test_workloads_hold_their_allowances_as_compiled(name: str, dtype: str, target: str) -> None:
    compiled = jobs.compile_workload(name, dtype, target)
    assert [str(finding) for finding in compiled.findings] == []
    assert set(compiled.compilations.values()) == {1}


def test_a_regression_names_the_workload_and_both_numbers() -> None:
    """As if the backward had come to spill, and a grid to be one program a few rows."""
    compiled = jobs.compile_workload("layer_norm_1024", "bfloat16", "sm_90")
    _, backward, _ = compiled.launches["forward+backward"]
    worse = dataclasses.replace(backward, spilled_bytes=24, programs=100)
    size = elements(WORKLOADS["layer_norm_1024"].shape("full"))
    found = findings.of_call([worse], "layer_norm_1024 bfloat16 sm_90", size, DEVICE_OF["sm_90"])
    assert [str(finding) for finding in found][:2] == [
        "layer_norm_1024 bfloat16 sm_90: row_norm_backward_kernel: spills: 24 bytes a thread, allowed none",
        "layer_norm_1024 bfloat16 sm_90: row_norm_backward_kernel: under-filled: 100 programs, allowed 132 and more",
    ]


def test_python_takes_no_more_than_twice_what_the_chain_takes() -> None:
    """Side by side in one run: norm, add and gelu in one call take about as long as the three."""
    for direction in ("forward", "forward+backward"):
        assert host_time(WORKLOADS["layer_norm_residual_gelu"], direction).ratio < 2
