"""What residual_add launches on an sm_90 that is not there: how often, how wide, how many compilations, no spill."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks.audit.binary import describe
from benchmarks.audit.targets import TARGETS
from fused_ops import functional as F
from fused_ops.activation import KNOWN
from tests.compiled.test_channel_norm_launches import compilations

MULTIPROCESSORS = 132  # of the device whose facts CPU tensors get
FORWARD, BACKWARD = "residual_add_forward_kernel", "residual_add_backward_kernel"
SUM = "column_sum_of_any_span_kernel"
DROPS = {"dropout_p": 0.1, "drop_path_p": 0.2}


def forward_and_backward(
    *shape: int,
    dtype: torch.dtype = torch.bfloat16,
    residual_dtype: torch.dtype | None = None,
    scale: tuple[int, ...] | None = None,
    channels_last: bool = False,
    offset: int = 0,
    **keywords: Any,
) -> None:
    """Runs residual_add and its backward on tensors without values, `offset` elements into their storage."""

    def made(dtype: torch.dtype) -> torch.Tensor:
        flat = torch.empty(math.prod(shape) + offset, dtype=dtype)[offset:]
        if not channels_last:
            return flat.view(shape)
        samples, channels, *positions = shape
        return flat.view(samples, *positions, channels).movedim(-1, 1)

    leaves = [made(dtype).requires_grad_(), made(residual_dtype or dtype).requires_grad_()]
    if scale is not None:
        keywords["scale"] = torch.empty(scale, requires_grad=True)
        leaves.append(keywords["scale"])
    y = F.residual_add(*leaves[:2], **keywords)
    torch.autograd.grad(y, leaves, torch.empty_like(y))


# A block of a ResNet, of a Transformer (GPT's, and CaiT's with its scale and drops) and of ConvNeXt, in both layouts.
CALLS: dict[str, tuple[tuple[int, ...], dict[str, Any], list[str]]] = {
    "bare": ((4096, 4096), {}, [FORWARD]),
    "relu": ((64, 64, 56, 56), {"activation": "relu"}, [FORWARD, BACKWARD]),
    "gelu": ((4096, 1024), {"activation": "gelu"}, [FORWARD, BACKWARD]),
    "dropout": ((4096, 1024), {"dropout_p": 0.1}, [FORWARD, BACKWARD]),
    "drop-path": ((64, 64, 28, 28), {"drop_path_p": 0.1}, [FORWARD, BACKWARD]),
    "a scale of rows": ((4096, 1024), {"scale": (1024,)}, [FORWARD, BACKWARD, SUM]),
    "CaiT": ((64, 197, 384), {"scale": (384,), **DROPS}, [FORWARD, BACKWARD, SUM]),
    "ConvNeXt": ((64, 96, 56, 56), {"scale": (96, 1, 1), "drop_path_p": 0.1}, [FORWARD, BACKWARD, SUM]),
    "ConvNeXt, 7x7": ((64, 768, 7, 7), {"scale": (768, 1, 1), "drop_path_p": 0.1}, [FORWARD, BACKWARD, SUM]),
    "ConvNeXt, channels_last": (
        (64, 96, 28, 28),
        {"scale": (96, 1, 1), "drop_path_p": 0.1, "channels_last": True},
        [FORWARD, BACKWARD, SUM, SUM],
    ),
    "everything, channels_last": (
        (64, 96, 14, 14),
        {"scale": (96, 1, 1), "activation": "relu", "channels_last": True, **DROPS},
        [FORWARD, BACKWARD, SUM, SUM],
    ),
    "everything": ((64, 197, 384), {"scale": (384,), "activation": "gelu", **DROPS}, [FORWARD, BACKWARD, SUM]),
}
TYPES = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float32": {"dtype": torch.float32},
    "bfloat16 on a float32 stream": {"dtype": torch.bfloat16, "residual_dtype": torch.float32},
}


@pytest.mark.one_in(8)
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("name", CALLS)
def test_nothing_spills_and_elements_move_sixteen_bytes_at_a_time(name, types, sm_90):
    shape, fields, expected = CALLS[name]
    forward_and_backward(*shape, **fields, **TYPES[types])
    assert [launch.kernel for launch in sm_90] == expected
    for found in (describe(launch, TARGETS["sm_90"]) for launch in sm_90):
        assert found.spilled_bytes == 0, f"{found.kernel} spills"
        if found.kernel != SUM:
            assert max(found.widths) == 16, f"{found.kernel}: {found.widths}"
            assert found.programs >= MULTIPROCESSORS, f"{found.kernel}: {found.programs} programs"


@pytest.mark.one_in(80)
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("activation", KNOWN)
@pytest.mark.parametrize("name", ["gelu", "a scale of rows", "everything", "everything, channels_last"])
def test_no_activation_spills(name, activation, types, sm_90):
    shape, fields, _ = CALLS[name]
    forward_and_backward(*shape, **{**fields, "activation": activation}, **TYPES[types])
    found = [describe(launch, TARGETS["sm_90"]) for launch in sm_90]
    assert {launch.kernel: launch.spilled_bytes for launch in found if launch.spilled_bytes} == {}


def test_row_counts_rates_and_seeds_compile_nothing_anew(sm_90):
    for rows, p in ((1, 0.1), (2, 0.1), (16, 0.5), (17, 0.9), (48, 1.0), (4096, 0.3)):
        torch.manual_seed(rows)
        forward_and_backward(rows, 1024, scale=(1024,), activation="gelu", dropout_p=p, drop_path_p=p)
    assert set(compilations(sm_90).values()) == {1}


def test_sizes_compile_nothing_anew_but_for_groups_of_eight(sm_90):
    """Elements that fill groups of eight, positions that do, and channels that do: one kernel each."""
    for shape in ((4, 64, 56, 56), (5, 32, 28, 28), (64, 96, 8, 3), (2, 3, 4, 2)):
        forward_and_backward(*shape, activation="relu", drop_path_p=0.1)
    assert set(compilations(sm_90).values()) == {1}
    for shape in ((3, 5, 7, 7), (1, 1, 1, 1), (7, 3, 5, 9)):
        forward_and_backward(*shape, activation="relu", drop_path_p=0.1)
    assert set(compilations(sm_90).values()) == {2}


@pytest.mark.parametrize("scale", [(-1, 1, 1, 1), (-1, 64, 8, 8), (64, 1, 1)], ids=str)
def test_batches_compile_once_whatever_the_scale_is_of(scale, sm_90):
    """A gate of samples, whose length is the batch's; of every element; of channels."""
    for samples in (8, 16, 24, 72):
        forward_and_backward(samples, 64, 8, 8, scale=tuple(samples if size < 0 else size for size in scale))
    assert set(compilations(sm_90).values()) == {1}


def test_activation_parameters_compile_nothing_anew(sm_90):
    for slope in (0.01, 0.2, 1.0):
        forward_and_backward(64, 1024, activation=torch.nn.LeakyReLU(slope))
    assert set(compilations(sm_90).values()) == {1}


@pytest.mark.parametrize("positions", [(7, 7), (14, 14), (56, 56), (3,)])
def test_batches_of_images_compile_once(positions, sm_90):
    for samples in (1, 2, 8, 63):
        forward_and_backward(samples, 64, *positions, scale=(64, *[1] * len(positions)), drop_path_p=0.1)
    ragged = 64 * math.prod(positions) % 8 != 0
    assert set(compilations(sm_90).values()) == {2 if ragged else 1}


def test_what_is_remembered_depends_on_alignment_and_type(sm_90):
    """Aligned, unaligned, aligned again, another type: each gets a kernel of its own, and the first comes back."""
    for dtype, offset in ((torch.float32, 0), (torch.float32, 1), (torch.float32, 0), (torch.bfloat16, 0)):
        forward_and_backward(8, 1024, dtype=dtype, offset=offset, activation="relu")
    aligned, unaligned, again, half = (launch.compiled for launch in sm_90 if launch.kernel == FORWARD)
    assert aligned is again
    assert len({aligned.hash, unaligned.hash, half.hash}) == 3


@pytest.mark.one_in(3)
@pytest.mark.parametrize("wanted", ["x", "residual", "scale"])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_each_gradient_compiles_alone(activation, wanted, sm_90):
    """None in a tuple that a jit function returns does not compile, though it is interpreted."""
    tensors = {"x": torch.empty(64, 256), "residual": torch.empty(64, 256), "scale": torch.empty(256)}
    tensors[wanted].requires_grad_()
    y = F.residual_add(tensors["x"], tensors["residual"], scale=tensors["scale"], activation=activation, **DROPS)
    torch.autograd.grad(y, tensors[wanted], torch.empty_like(y))
    expected = [FORWARD] if wanted == "residual" and activation is None else [FORWARD, BACKWARD]
    assert [launch.kernel for launch in sm_90] == [*expected, *([SUM] if wanted == "scale" else [])]


SCALES = [(), (1,), (64, 1, 1), (8,), (6, 8), (6, 1), (64, 1, 8), (16, 1, 1, 1), (16, 64, 6, 8)]


@pytest.mark.one_in(6)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_scale_of_any_shape_compiles(scale, channels_last, sm_90):
    """Of few channels the sums take two launches; a scale with a gap between its axes is torch's to broadcast."""
    forward_and_backward(16, 64, 6, 8, scale=scale, channels_last=channels_last, activation="silu", **DROPS)
    sums = [] if scale == (64, 1, 8) else [SUM, SUM] if scale == (8,) and not channels_last else [SUM]
    assert [launch.kernel for launch in sm_90] == ([FORWARD, BACKWARD, *sums] if sums else [])
    found = [describe(launch, TARGETS["sm_90"]) for launch in sm_90]
    assert {launch.kernel: launch.spilled_bytes for launch in found if launch.spilled_bytes} == {}
