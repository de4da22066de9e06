"""What the add_ norms with dropout launch on an sm_90 that is not there: no more than without, how wide, no spill, and
nothing is compiled anew for a rate or a seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.audit.binary import describe
from benchmarks.audit.targets import TARGETS
from fused_ops import functional as F
from fused_ops.activation import KNOWN
from tests.compiled.test_batch_norm_launches import MIXED, WHOLE
from tests.compiled.test_channel_norm_launches import PIECES, compilations

ROWS = ["row_norm_forward_kernel", "row_norm_backward_kernel", "column_sum_kernel"]
GROUPS = ["channel_norm_forward_kernel", "channel_norm_backward_kernel", "column_sum_kernel"]
SHARED = ["row_moments_kernel", "row_apply_kernel"]
SHARED_BACK = ["row_gradient_sums_kernel", "row_gradient_apply_kernel", "column_sum_kernel"]
BF16, F32 = torch.bfloat16, torch.float32


def forward_and_backward(
    function: str,
    shape: tuple[int, ...],
    dtype: torch.dtype = BF16,
    residual_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    dropout_p: float = 0.1,
    activation: str | None = None,
    wanted: tuple[str, ...] = ("x", "residual", "weight", "bias"),
) -> None:
    """Runs an add_ norm and its backward on tensors without values."""

    def made(dtype: torch.dtype) -> torch.Tensor:
        if not channels_last:
            return torch.empty(shape, dtype=dtype)
        return torch.empty(shape[0], *shape[2:], shape[1], dtype=dtype).movedim(-1, 1)

    of_rows = "layer" in function or "rms" in function
    leaves = {"x": made(dtype), "residual": made(residual_dtype or dtype)}
    leaves |= {name: torch.empty(shape[-1] if of_rows else shape[1]) for name in ("weight", "bias")}
    own: dict[str, Any] = {"normalized_shape": shape[-1:]} if of_rows else {}
    if "rms" in function:
        del leaves["bias"]
    if "group" in function:
        own["num_groups"] = 32
    if "batch" in function or "switch" in function:
        own |= {"running_mean": torch.empty(shape[1]), "running_var": torch.empty(shape[1]), "training": True}
    if "switch" in function:
        own |= {"mean_weight": torch.zeros(3), "var_weight": torch.zeros(3)}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted)
    outputs = getattr(F, function)(
        leaves["x"], leaves["residual"], **own, **{n: leaves[n] for n in ("weight", "bias") if n in leaves},
        activation=activation, dropout_p=dropout_p,
    )  # fmt: skip
    asked = [leaf for leaf in leaves.values() if leaf.requires_grad]
    used = [output for output in outputs if output.requires_grad]
    torch.autograd.grad(used, asked, [torch.empty_like(output) for output in used])


# The stream of a Transformer before a norm (BERT's, LLaMA's), of a U-Net and of a pre-activation ResNet.
CALLS: dict[str, tuple[str, tuple[int, ...], dict[str, Any], list[str]]] = {
    "rows of 768": ("add_layer_norm", (8192, 768), {}, ROWS),
    "rows of 768 on a float32 stream": ("add_layer_norm", (8192, 768), {"residual_dtype": F32}, ROWS),
    "rows of 4096": ("add_rms_norm", (4096, 4096), {}, ROWS),
    "rows of 4096 on a float32 stream": ("add_rms_norm", (4096, 4096), {"residual_dtype": F32}, ROWS),
    "rows of 1024, float32": ("add_layer_norm", (8192, 1024), {"dtype": F32}, ROWS),
    "rows of 512, float64": ("add_layer_norm", (8192, 512), {"dtype": torch.float64}, ROWS),
    "rows of 767": ("add_layer_norm", (8192, 767), {}, ROWS),
    "long rows": ("add_layer_norm", (64, 65536), {}, [*SHARED, *SHARED_BACK]),
    "groups of 8x8": ("add_group_norm", (64, 320, 8, 8), {}, GROUPS),
    "groups of 7x7": ("add_group_norm", (64, 256, 7, 7), {}, GROUPS),
    "groups of 64x64, float32": ("add_group_norm", (16, 64, 64, 64), {"dtype": F32}, GROUPS),
    "groups of twice as many values, float32": ("add_group_norm", (16, 128, 64, 64), {"dtype": F32}, PIECES),
    "groups of 64x64": ("add_group_norm", (8, 320, 64, 64), {}, PIECES),
    "groups, channels_last": ("add_group_norm", (16, 320, 32, 32), {"channels_last": True}, PIECES),
    "groups, channels_last, on a float32 stream": (
        "add_group_norm", (16, 320, 32, 32), {"channels_last": True, "residual_dtype": F32}, PIECES,
    ),
    "groups, channels_last, float32": (
        "add_group_norm", (16, 320, 32, 32), {"channels_last": True, "dtype": F32}, PIECES,
    ),
    "planes that fit": ("add_instance_norm", (16, 64, 32, 32), {}, GROUPS),
    "planes": ("add_instance_norm", (4, 64, 192, 192), {}, PIECES),
    "channels that fit": ("add_batch_norm", (16, 256, 7, 7), {}, WHOLE),
    "channels of twice as many values": ("add_batch_norm", (32, 256, 7, 7), {}, PIECES),
    "channels that fit, channels_last": ("add_batch_norm", (8, 64, 7, 7), {"channels_last": True}, WHOLE),
    "channels": ("add_batch_norm", (64, 64, 56, 56), {}, PIECES),
    "channels, 14x14": ("add_batch_norm", (128, 256, 14, 14), {}, PIECES),
    "channels, channels_last": ("add_batch_norm", (64, 64, 56, 56), {"channels_last": True}, PIECES),
    "channels, float32": ("add_batch_norm", (64, 64, 56, 56), {"dtype": F32}, PIECES),
    "mixtures": ("add_switch_norm", (16, 64, 56, 56), {}, MIXED),
    "mixtures, channels_last": ("add_switch_norm", (16, 64, 56, 56), {"channels_last": True}, MIXED),
}  # fmt: skip
# Rows, planes and channels that begin between 16-byte boundaries, and groups that fit on chip; not those that drop.
SMALLER_TILES = (
    "rows of 767", "groups of 7x7", "channels that fit", "channels of twice as many values",
    "groups of twice as many values, float32",
)  # fmt: skip


@pytest.mark.one_in(16)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("name", CALLS)
def test_nothing_spills_and_no_launch_is_added(name: str, activation: str | None, sm_90: list[Any]) -> None:
    function, shape, fields, expected = CALLS[name]
    forward_and_backward(function, shape, activation=activation, **fields)
    assert [launch.kernel for launch in sm_90] == expected
    found = [describe(launch, TARGETS["sm_90"]) for launch in sm_90]
    assert {launch.kernel: launch.spilled_bytes for launch in found if launch.spilled_bytes} == {}


@pytest.mark.one_in(120)
@pytest.mark.parametrize("activation", KNOWN)
@pytest.mark.parametrize("name", CALLS)
def test_no_activation_spills(name: str, activation: str, sm_90: list[Any]) -> None:
    function, shape, fields, _ = CALLS[name]
    forward_and_backward(function, shape, activation=activation, **fields)
    found = [describe(launch, TARGETS["sm_90"]) for launch in sm_90]
    assert {launch.kernel: launch.spilled_bytes for launch in found if launch.spilled_bytes} == {}


@pytest.mark.one_in(12)
@pytest.mark.parametrize("wanted", [("x",), ("residual",), ("x", "residual"), ("bias",), ("x", "weight")], ids="-".join)
@pytest.mark.parametrize(
    "name", ["rows of 768", "long rows", "groups of 7x7", "groups, channels_last", "channels that fit"]
)
def test_each_gradient_compiles_alone(name: str, wanted: tuple[str, ...], sm_90: list[Any]) -> None:
    """None in a tuple that a jit function returns does not compile, though it is interpreted."""
    function, shape, fields, _ = CALLS[name]
    forward_and_backward(function, shape, wanted=wanted, **fields)
    found = [describe(launch, TARGETS["sm_90"]) for launch in sm_90]
    assert {launch.kernel: launch.spilled_bytes for launch in found if launch.spilled_bytes} == {}


@pytest.mark.parametrize(
    "name", ["rows of 768", "rows of 767", "groups, channels_last", "channels that fit", "mixtures"]
)
def test_rates_and_seeds_compile_nothing_anew(name: str, sm_90: list[Any]) -> None:
    function, shape, fields, _ = CALLS[name]
    for seed, p in enumerate((0.1, 0.1, 0.5, 0.999, 1.0, 1e-12)):
        torch.manual_seed(seed)
        forward_and_backward(function, shape, dropout_p=p, activation="gelu", **fields)
    assert set(compilations(sm_90).values()) == {1}


def test_row_counts_compile_nothing_anew(sm_90: list[Any]) -> None:
    for rows in (1, 2, 16, 17, 48, 4096):
        forward_and_backward("add_layer_norm", (rows, 768))
    assert set(compilations(sm_90).values()) == {1}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["groups, channels_last", "channels", "channels, channels_last", "planes"])
def test_batches_of_images_compile_once(name: str, sm_90: list[Any]) -> None:
    function, (_, *rest), fields, _ = CALLS[name]
    for samples in (12, 13, 16, 65):
        forward_and_backward(function, (samples, *rest), **fields)
    assert set(compilations(sm_90).values()) == {1}


@pytest.mark.one_in(10)
@pytest.mark.parametrize("name", [name for name in CALLS if name not in SMALLER_TILES])
def test_activations_move_as_wide_as_without_dropout(name: str, sm_90: list[Any]) -> None:
    """What the numbers are drawn for does not lie otherwise for it."""
    function, shape, fields, _ = CALLS[name]
    widest: list[dict[str, int]] = []
    for p in (0.0, 0.1):
        sm_90.clear()
        forward_and_backward(function, shape, dropout_p=p, **fields)
        widest.append({launch.kernel: max(describe(launch, TARGETS["sm_90"]).widths) for launch in sm_90})
    assert widest[0] == widest[1]
