"""Peers' calls, on stand-ins for their libraries: the signatures that their sources have, in plain torch.

What a library's own kernels compute, the benchmark's gate judges where there is a GPU.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as TF

from benchmarks import correctness
from benchmarks.peers import LIBRARIES, apex, flag_gems, flash_attention, transformer_engine
from benchmarks.traffic import DIRECTIONS, Direction
from benchmarks.workloads import WORKLOADS, Workload

CPU = torch.device("cpu")
Tensor = torch.Tensor
aten = torch.ops.aten


# --- flash-attention: flash_attn/ops/triton/layer_norm.py ---------------------------------------------------------


def flash_layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    zero_centered_weight: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    if is_rms_norm:
        assert bias is None
        y = TF.rms_norm(total, weight.shape, weight, eps)
    else:
        y = TF.layer_norm(total, weight.shape, weight, bias, eps)
    return (y, total) if prenorm else y


def flash_rms_norm_fn(x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Any:
    return flash_layer_norm_fn(x, weight, bias, **options, is_rms_norm=True)


# --- Apex: apex/normalization/fused_layer_norm.py, apex/contrib/group_norm/group_norm.py --------------------------


def apex_layer_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized_shape: torch.Size,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    return TF.layer_norm(input, normalized_shape, weight, bias, eps)


def apex_rms_norm(
    input: Tensor, weight: Tensor, normalized_shape: torch.Size, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    return TF.rms_norm(input, normalized_shape, weight, eps)


class ApexGroupNorm(torch.nn.Module):
    SUPPORTED_CHANNELS = frozenset({320, 1280})
    SUPPORTED_GROUPS = frozenset({16, 32})

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        act: str = "",
    ) -> None:
        super().__init__()
        self.num_groups, self.eps, self.act = num_groups, eps, act.lower()
        self.weight = torch.nn.Parameter(torch.ones(num_channels))
        self.bias = torch.nn.Parameter(torch.zeros(num_channels))

    def forward(self, input: Tensor) -> Tensor:
        assert input.is_contiguous(memory_format=torch.channels_last)
        y = TF.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        y = TF.silu(y) if self.act == "silu" else y
        if y.requires_grad:
            y.register_hook(in_channels_last)
        return y


def in_channels_last(gradient: Tensor) -> None:
    assert gradient.is_contiguous(memory_format=torch.channels_last)


# --- Transformer Engine: transformer_engine/pytorch/csrc/extensions/normalization.cpp -----------------------------


def te_layernorm_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    ln_out: None,
    quantizer: None,
    otype: str,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Tensor]:
    assert input.dim() == 2 and input.is_contiguous()
    assert (ln_out, quantizer, otype, sm_margin, zero_centered_gamma) == (None, None, "kFloat32", 0, False)
    return list(aten.native_layer_norm(input, weight.shape, weight, bias, eps))


def te_layernorm_bwd(
    dz: Tensor, x: Tensor, mu: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    assert (sm_margin, zero_centered_gamma) == (0, False)
    every = [True, True, True]
    return list(aten.native_layer_norm_backward(dz, x, gamma.shape, mu, rsigma, gamma, torch.zeros_like(gamma), every))


def te_rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: None,
    quantizer: None,
    otype: str,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Tensor | None]:
    assert input.dim() == 2 and input.is_contiguous()
    assert (ln_out, quantizer, otype, sm_margin, zero_centered_gamma) == (None, None, "kFloat32", 0, False)
    rsigma = torch.rsqrt(input.square().mean(-1) + eps)
    return [input * rsigma[:, None] * weight, None, rsigma]


def te_rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> list[Tensor]:
    assert (sm_margin, zero_centered_gamma) == (0, False)
    normalized, scaled = x * rsigma[:, None], dz * gamma
    dx = (scaled - normalized * (scaled * normalized).mean(-1, keepdim=True)) * rsigma[:, None]
    return [dx, (dz * normalized).sum(0)]


# --- FlagGems: src/flag_gems/ops/batch_norm.py --------------------------------------------------------------------


def flag_gems_batch_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Tensor, ...]:
    return aten.native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)


def flag_gems_batch_norm_backward(
    grad_out: Tensor,
    input: Tensor,
    weight: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    save_mean: Tensor | None = None,
    save_invstd: Tensor | None = None,
    train: bool = False,
    eps: float = 1e-5,
    output_mask: tuple[bool, ...] = (),
) -> tuple[Tensor, ...]:
    statistics = (weight, running_mean, running_var, save_mean, save_invstd)
    return aten.native_batch_norm_backward(grad_out, input, *statistics, train, eps, output_mask)


# ------------------------------------------------------------------------------------------------------------------

STAND_INS: dict[str, dict[str, Any]] = {
    "flash_attn.ops.triton.layer_norm": {"layer_norm_fn": flash_layer_norm_fn, "rms_norm_fn": flash_rms_norm_fn},
    "apex.normalization.fused_layer_norm": {
        "fused_layer_norm_affine": apex_layer_norm,
        "fused_rms_norm_affine": apex_rms_norm,
    },
    "apex.contrib.group_norm": {"GroupNorm": ApexGroupNorm},
    "transformer_engine.pytorch": {},
    "transformer_engine.pytorch.constants": {"TE_DType": {torch.float32: "kFloat32"}},
    "transformer_engine_torch": {
        "layernorm_fwd": te_layernorm_fwd,
        "layernorm_bwd": te_layernorm_bwd,
        "rmsnorm_fwd": te_rmsnorm_fwd,
        "rmsnorm_bwd": te_rmsnorm_bwd,
    },
    "flag_gems.ops.batch_norm": {
        "batch_norm": flag_gems_batch_norm,
        "batch_norm_backward": flag_gems_batch_norm_backward,
    },
}
CALLED = {
    flash_attention: {"layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"},
    apex: {"layer_norm", "rms_norm", "group_norm"},
    transformer_engine: {"layer_norm", "rms_norm"},
    flag_gems: {"batch_norm"},
}


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, contents in STAND_INS.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def cases() -> list[Any]:
    return [
        pytest.param(library, workload, id=f"{library.NAME}-{workload.name}")
        for library, functions in CALLED.items()
        for workload in WORKLOADS.values()
        if workload.function in functions and (workload.function != "group_norm" or workload.channels_last)
    ]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("library", "workload"), cases())
def test_a_peer_s_call_passes_the_gate(
    library: ModuleType, workload: Workload, direction: Direction, stand_ins: None
) -> None:
    case = workload.case("tiny", torch.float32, CPU)
    expected = correctness.expect(workload, case)
    verdict = correctness.check(workload, case, library.PEER.build(workload), expected, direction)
    assert not verdict.reason


def test_a_batch_norm_updates_the_running_statistics(stand_ins: None) -> None:
    workload = WORKLOADS["resnet50_64x56_batch_norm"]
    case = workload.case("tiny", torch.float32, CPU)
    own, other = case.copy(), case.copy()
    flag_gems.PEER.build(workload)(**own.arguments)
    workload.torch_composition()(**other.arguments)
    assert not torch.equal(own.state["running_mean"], case.state["running_mean"])
    for name, tensor in own.state.items():
        torch.testing.assert_close(tensor, other.state[name])


def test_a_group_norm_that_apex_hands_to_torch_is_a_gap(installed: None) -> None:
    kept, left = WORKLOADS["sd_unet_320_group_norm_channels_last"], WORKLOADS["sd_unet_320_group_norm"]
    assert apex.PEER.gap(kept, "cuda") == ""
    assert "channels_last" in apex.PEER.gap(left, "cuda")
    assert "GPU" in apex.PEER.gap(left, "cpu")


def test_a_number_of_groups_that_apex_hands_to_torch_is_refused(stand_ins: None) -> None:
    workload = Workload("w", "group_norm", WORKLOADS["sd_unet_320_group_norm"].shapes, groups=8, channels_last=True)
    with pytest.raises(NotImplementedError, match="8 groups of 320 channels"):
        apex.PEER.build(workload)


def test_a_library_says_why_it_has_no_call(installed: None) -> None:
    assert "backward" in transformer_engine.PEER.gap(WORKLOADS["llama3_8b_add_rms_norm"], "cuda")
    assert "running statistics" in apex.PEER.gap(WORKLOADS["resnet50_64x56_batch_norm"], "cuda")
    assert flash_attention.PEER.gap(WORKLOADS["sd_unet_320_group_norm"], "cuda") == "flash_attn has no group_norm"


def test_libraries_have_names_of_their_own() -> None:
    assert len({library.NAME for library in LIBRARIES}) == len(LIBRARIES)
