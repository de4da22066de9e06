"""The emulator of PTX: kernels made wrong on purpose are caught by name, and their mended twins are not; public calls,
compiled for an sm_90, compute what they should."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import fused_ops
from benchmarks.audit.emulator import Finding, UnknownInstruction, emulating, findings
from benchmarks.audit.emulator.driver import run
from benchmarks.audit.inert import Launch, compiling_for
from benchmarks.audit.targets import DEVICE_OF, TARGETS
from fused_ops import functional as F
from tests.calls import as_tuple
from tests.tolerances import assert_within_budget
from tests.wrong_kernels import copy_kernel

# Triton 3.9 wants to be told whether to fuse multiply and add; these kernels do not mind.
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

Tensor = torch.Tensor
BLOCK = 128


@pytest.fixture
def emulated() -> Iterator[list[Finding]]:
    """Runs what is compiled for an sm_90; the list fills with what is found wrong."""
    with emulating(TARGETS["sm_90"]) as found:
        yield found


def kinds(found: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.kernel, finding.what) for finding in found]


# --- kernels made wrong on purpose -----------------------------------------------------------------------------------


@triton.jit
def stepping_kernel(X_ptr, Y_ptr, step, MULTIPLE: tl.constexpr, BLOCK: tl.constexpr):
    """A step under BLOCK makes neighbours write one address; one that is no multiple of MULTIPLE belies the hint."""
    first = tl.multiple_of(tl.program_id(0) * step, MULTIPLE)
    offsets = first + tl.arange(0, BLOCK)
    tl.store(Y_ptr + offsets, tl.load(X_ptr + offsets))


@triton.jit
def scattering_kernel(X_ptr, Y_ptr, places, BLOCK: tl.constexpr):
    """With fewer places than elements, several elements go to one."""
    offsets = tl.arange(0, BLOCK)
    tl.store(Y_ptr + offsets % places, tl.load(X_ptr + offsets))


def counted(elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(elements).to(dtype)


def test_a_lane_outside_every_tensor_is_found_and_not_carried_out(emulated):
    x, y = counted(2 * BLOCK - 7), torch.empty(2 * BLOCK - 7)
    copy_kernel[(2,)](x, y, x.numel(), BLOCK, True)
    assert emulated == [] and torch.equal(x, y)
    copy_kernel[(2,)](x, y, x.numel(), BLOCK, False)
    assert kinds(emulated) == [("copy_kernel", findings.OUT_OF_BOUNDS)] * 2
    load, store = emulated
    assert re.match(r"byte 996 of X_ptr, which has 996, program 1, thread 121: @?.*ld\.global", load.where)
    assert re.match(r"byte 996 of Y_ptr, which has 996, program 1, thread 121: @?.*st\.global", store.where)
    assert torch.equal(x, y)


def test_a_hint_that_is_not_true_is_found(emulated):
    x, y = counted(1024), torch.zeros(1024)
    stepping_kernel[(2,)](x, y, BLOCK + 4, 4, BLOCK, num_warps=1)
    assert emulated == []
    stepping_kernel[(2,)](x, y, BLOCK + 2, 4, BLOCK, num_warps=1)
    assert kinds(emulated) == [("stepping_kernel", findings.MISALIGNED)] * 2
    assert emulated[0].where.startswith("16 bytes at byte 520 of X_ptr, which has 4096, program 1, thread 0: ld.global")


@pytest.mark.parametrize("programs", [2, 400])  # of one warp; 512 of them run at once
def test_two_programs_that_write_one_address_are_found(programs, emulated):
    x, y = counted(BLOCK * 1024), torch.zeros(BLOCK * 1024)
    stepping_kernel[(programs,)](x, y, BLOCK, 4, BLOCK, num_warps=1)
    assert emulated == []
    stepping_kernel[(programs,)](x, y, BLOCK - 4, 4, BLOCK, num_warps=1)
    assert kinds(emulated) == [("stepping_kernel", findings.TWO_PROGRAMS)]
    assert "of Y_ptr, program" in emulated[0].where


def test_a_store_of_two_values_to_one_address_is_found(emulated):
    x, y = counted(BLOCK), torch.zeros(BLOCK)
    scattering_kernel[(1,)](x, y, BLOCK, BLOCK)
    assert emulated == [] and torch.equal(x, y)
    scattering_kernel[(1,)](torch.ones(BLOCK), y, BLOCK - 5, BLOCK)
    assert emulated == []  # the same value twice
    scattering_kernel[(1,)](x, y, BLOCK - 5, BLOCK)
    assert kinds(emulated) == [("scattering_kernel", findings.TWO_VALUES)]


# --- compiled kernels made wrong, of which Triton makes no wrong ones ------------------------------------------------


@triton.jit
def row_sums_kernel(X_ptr, Sum_ptr, chunks, SPAN: tl.constexpr, STAGES: tl.constexpr):
    """Chunk after chunk, which are copied ahead, with a sum over all warps after each."""
    total = 0.0
    offsets = tl.program_id(0) * chunks * SPAN + tl.arange(0, SPAN)
    for chunk in tl.range(chunks, num_stages=STAGES):
        total += tl.sum(tl.load(X_ptr + offsets + chunk * SPAN), axis=0)
    tl.store(Sum_ptr + tl.program_id(0), total)


def sums_without(instruction: str | None) -> tuple[list[Finding], bool]:
    """What is found in the kernel compiled for an sm_90 without these instructions, and whether its sums are right."""
    rows, chunks, span = 3, 5, 512
    x, sums = counted(rows * chunks * span) % 17, torch.zeros(rows)
    with compiling_for(TARGETS["sm_90"]) as launches:
        row_sums_kernel[(rows,)](x, sums, chunks, span, 3)
    ptx = launches[0].compiled.asm["ptx"]
    if instruction:
        ptx, count = re.subn(rf"^\s*{re.escape(instruction)}\b[^;]*;", "", ptx, flags=re.MULTILINE)
        assert count
    shared = launches[0].compiled.metadata.shared
    compiled = SimpleNamespace(asm={"ptx": ptx}, metadata=SimpleNamespace(shared=shared))
    found: list[Finding] = []
    run(Launch("row_sums_kernel", rows, compiled), ["X_ptr", "Sum_ptr", "chunks"], [x, sums, chunks], found)
    return found, torch.equal(sums, x.view(rows, -1).sum(1))


def test_a_barrier_that_lacks_is_found():
    assert sums_without(None) == ([], True)
    found, _ = sums_without("bar.sync")
    assert {finding.what for finding in found} >= {findings.READ_BEFORE_BARRIER, findings.OVERWRITES_READ}


def test_a_copy_that_nothing_waits_for_is_found():
    found, right = sums_without("cp.async.wait_group")
    assert {finding.what for finding in found} == {findings.READ_BEFORE_DELIVERY} and not right


@triton.jit
def product_kernel(X_ptr, Y_ptr, BLOCK: tl.constexpr):
    """On tensor cores, which no kernel here uses."""
    offsets = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(X_ptr + offsets)
    tl.store(Y_ptr + offsets, tl.dot(x, x).to(tl.float16))


def test_an_unknown_instruction_is_named(emulated):
    with pytest.raises(UnknownInstruction, match=r"(mma|ldmatrix)\.\w+"):
        product_kernel[(1,)](*torch.zeros(2, 32, 32, dtype=torch.float16), 32)


# --- arithmetic ------------------------------------------------------------------------------------------------------


@triton.jit
def integers_kernel(A_ptr, B_ptr, Y_ptr, BLOCK: tl.constexpr):
    """A result a row."""
    place = tl.arange(0, BLOCK)
    a, b = tl.load(A_ptr + place), tl.load(B_ptr + place)
    tl.store(Y_ptr + place, a // b)
    tl.store(Y_ptr + BLOCK + place, a % b)
    tl.store(Y_ptr + 2 * BLOCK + place, a * b + a)
    tl.store(Y_ptr + 3 * BLOCK + place, a >> 3)
    tl.store(Y_ptr + 4 * BLOCK + place, a << 3)
    tl.store(Y_ptr + 5 * BLOCK + place, (a & b) ^ (a | 5))
    tl.store(Y_ptr + 6 * BLOCK + place, tl.minimum(tl.abs(a), b))
    tl.store(Y_ptr + 7 * BLOCK + place, a.to(tl.float32).to(b.dtype))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_integers_are_computed_as_torch_does(dtype, emulated):
    draw = torch.Generator().manual_seed(0)
    a = torch.randint(-(2**14), 2**14, (BLOCK,), generator=draw).to(dtype)
    b = torch.randint(1, 100, (BLOCK,), generator=draw).to(dtype)
    y = torch.empty(8, BLOCK, dtype=dtype)
    integers_kernel[(1,)](a, b, y, BLOCK)
    truncated = [torch.div(a, b, rounding_mode="trunc"), torch.fmod(a, b)]
    others = [a * b + a, a >> 3, a << 3, (a & b) ^ (a | 5), torch.minimum(a.abs(), b), a.float().to(dtype)]
    assert torch.equal(y, torch.stack(truncated + others)) and emulated == []


@triton.jit
def multiply_add_kernel(A_ptr, B_ptr, C_ptr, Y_ptr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(Y_ptr + place, tl.load(A_ptr + place) * tl.load(B_ptr + place) + tl.load(C_ptr + place))


def test_a_contracted_multiply_add_is_rounded_once(emulated):
    """What the interpreter never does, and a compiled kernel where the compiler likes."""
    a = 1 + counted(BLOCK) * 2.0**-23
    y = torch.empty(BLOCK)
    multiply_add_kernel[(1,)](a, a, -(a * a), y, BLOCK)
    assert torch.equal(y.double(), a.double() * a.double() - (a * a).double())
    assert y.count_nonzero() > BLOCK / 2 and emulated == []


@triton.jit
def rounding_kernel(X_ptr, Y_ptr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(Y_ptr + place, tl.load(X_ptr + place).to(Y_ptr.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_rounded_as_torch_does(dtype, emulated):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(BLOCK, generator=draw) * 10.0 ** torch.randint(-42, 39, (BLOCK,), generator=draw)
    x[:6] = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8])
    y = torch.empty(BLOCK, dtype=dtype)
    rounding_kernel[(1,)](x, y, BLOCK)
    assert torch.equal(y.nan_to_num(7), x.to(dtype).nan_to_num(7)) and emulated == []
    assert torch.equal(y.isnan(), x.isnan())


# --- public calls ----------------------------------------------------------------------------------------------------


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.5 + 0.3).to(dtype)


def outputs_and_gradients(call: Callable[..., Any], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Of a call on these inputs as this type, with gradients of its outputs that are drawn in float32."""
    leaves = [each.detach().to(dtype).requires_grad_() for each in inputs]
    outputs = as_tuple(call(*leaves))
    gradients = [normal(*each.shape, seed=9 + place).to(dtype) for place, each in enumerate(outputs)]
    return [*(each.detach() for each in outputs), *torch.autograd.grad(outputs, leaves, gradients)]


def check(call: Callable[..., Any], inputs: list[Tensor], judged_by: Callable[..., Any] | None = None) -> None:
    """Within torch eager's own error, forward and backward, and nothing found. Of inputs the first have x's shape."""
    dtype, judged_by = inputs[0].dtype, judged_by or call
    launches: list[Launch] = []
    with emulating(TARGETS["sm_90"], launches=launches) as found:
        ours = outputs_and_gradients(call, inputs, dtype)
    assert found == [] and len(launches) >= 2
    with fused_ops.use_backend("torch"):
        eager = outputs_and_gradients(judged_by, inputs, dtype)
        expected = outputs_and_gradients(judged_by, inputs, torch.float64)
    for place, (our, their, exact) in enumerate(zip(ours, eager, expected, strict=True)):
        terms = inputs[0].numel() // our.numel()
        assert_within_budget(f"result {place}", our, their, exact, terms=terms)


def parameters(count: int, dtype: torch.dtype) -> list[Tensor]:
    return [normal(count, dtype=dtype, seed=5), normal(count, dtype=dtype, seed=6)]


def test_layer_norm():
    x = normal(12, 520, dtype=torch.bfloat16)
    check(lambda x, weight, bias: F.layer_norm(x, (520,), weight, bias), [x, *parameters(520, x.dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [7, 13, 14])
def test_group_norm_of_short_planes(side, dtype):
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.group_norm(x, 2, weight, bias, activation="relu")

    check(call, [normal(2, 8, side, side, dtype=dtype), *parameters(8, dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_channels_last(dtype):
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.group_norm(x.contiguous(memory_format=torch.channels_last), 4, weight, bias, activation="silu")

    check(call, [normal(2, 16, 9, 9, dtype=dtype), *parameters(16, dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm(dtype):
    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        statistics = torch.zeros(6), torch.ones(6)
        return F.batch_norm(x, *statistics, weight, bias, training=True, residual=residual, activation="gelu")

    x, residual = (normal(3, 6, 10, 10, dtype=dtype, seed=seed) for seed in (0, 1))
    check(call, [x, residual, *parameters(6, dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_layer_norm_with_dropout(dtype):
    p, span = 0.3, 300
    x, residual = (normal(8, span, dtype=dtype, seed=seed) for seed in (0, 1))

    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        return F.add_layer_norm(x, residual, (span,), weight, bias, dropout_p=p)

    with emulating(TARGETS["sm_90"]):
        _, dropped = call(torch.ones_like(x), torch.zeros_like(x), *parameters(span, dtype))
    kept = dropped != 0
    assert 0.6 < kept.double().mean() < 0.8

    def without_dropout(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return F.add_layer_norm(x * kept / (1 - p), residual, (span,), weight, bias)

    check(call, [x, residual, *parameters(span, dtype)], judged_by=without_dropout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(9, 7), (9, 31), (9, 12, 1, 1), (2, 6, 3, 3), (3, 8, 5, 5)])
def test_threads_agree_about_a_sum_of_few(shape, dtype):
    """Where a thread has one element, its product was contracted with its neighbour's in the first exchange: each half
    of a warp then stored a mean of its own to one address of shared memory."""

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if x.dim() == 2:
            return F.layer_norm(x, x.shape[1:], weight, bias, activation="gelu")
        return F.group_norm(x, 2, weight, bias, activation="silu")

    inputs = [normal(*shape, dtype=dtype), *parameters(shape[1], dtype)]
    with emulating(TARGETS["sm_90"]) as found:
        outputs_and_gradients(call, inputs, dtype)
    assert found == []


def test_a_long_row_has_the_same_bits_walked_and_shared():
    """Contracted to a multiply-add in one of the two kernels only, the merge of its chunks had not, in three of these
    rows. Levels change along a row, so that the last bit of each chunk's share in the mean counts."""
    rows, span = 24, 30000
    x = normal(rows, span) + torch.linspace(-3, 5, span)
    facts, launches = DEVICE_OF["sm_90"].facts._replace(multiprocessors=rows), []
    with emulating(TARGETS["sm_90"], facts=facts, launches=launches) as found, torch.no_grad():
        many, few = F.layer_norm(x, (span,)), F.layer_norm(x[:-1].clone(), (span,))
    kernels = [launch.kernel for launch in launches]
    assert kernels == ["row_walk_forward_kernel", "row_moments_kernel", "row_apply_kernel"] and found == []
    assert torch.equal(many[:-1], few)
