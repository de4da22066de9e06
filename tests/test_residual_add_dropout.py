"""What dropout and drop-path drop: as often as they should, independently, the same in backward, and as torch's
generator says. Bounds are five standard deviations, for a chi-square by Wilson and Hilferty's cube root.

Philox passes every such test there is: these find what is wrong with how it is counted, keyed and compared.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch

import fused_ops
from fused_ops import functional as F
from tests.layouts import channels_last
from tests.norm_cases import DEVICE, DTYPES, normal, same_bits, short
from tests.residual_add_cases import IMAGE, blocks_of, has_gap, make_case

Tensor = torch.Tensor

SIGMAS = 5.0
BOTH = {"dropout_p": 0.3, "drop_path_p": 0.4}
HALVES = {"dropout_p": 0.5, "drop_path_p": 0.5}  # whose factors, and sums of them, have no rounding


def each_rate(both: dict[str, float]) -> pytest.MarkDecorator:
    """Parametrizes over either rate and both."""
    return pytest.mark.parametrize("rates", [*({name: rate} for name, rate in both.items()), both], ids="-".join)


def factors(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, **rates: float) -> Tensor:
    """What the elements of an x of this shape are multiplied by."""
    torch.manual_seed(seed)
    ones, zeros = (fill(shape, dtype=dtype, device=DEVICE) for fill in (torch.ones, torch.zeros))
    with fused_ops.use_backend("triton"):
        return F.residual_add(ones, zeros, **rates)


def kept(*shape: int, seed: int = 0, **rates: float) -> np.ndarray:
    return (factors(*shape, seed=seed, **rates) != 0).cpu().numpy()


def assert_fraction(mask: np.ndarray, expected: float) -> None:
    deviation = math.sqrt(expected * (1 - expected) / mask.size)
    assert abs(mask.mean() - expected) <= SIGMAS * deviation, f"{mask.mean()} of {mask.size} kept, not {expected}"


def assert_uncorrelated(a: np.ndarray, b: np.ndarray, p: float = 0.5, other_p: float | None = None) -> None:
    """Of n independent pairs the correlation has deviation 1 / sqrt(n)."""
    other_p = p if other_p is None else other_p
    products = (a.ravel() - (1 - p)) * (b.ravel() - (1 - other_p))
    correlation = products.mean() / math.sqrt(p * (1 - p) * other_p * (1 - other_p))
    assert abs(correlation) <= SIGMAS / math.sqrt(a.size), f"correlation {correlation:.4f} of {a.size} pairs"


def assert_chi_square(observed: np.ndarray, expected: np.ndarray | float) -> None:
    """Neither too far from what is expected nor too near."""
    found, freedom = float(((observed - expected) ** 2 / expected).sum()), observed.size - 1
    variance = 2 / (9 * freedom)
    low, high = (freedom * (1 - variance + sign * SIGMAS * math.sqrt(variance)) ** 3 for sign in (-1, 1))
    assert low <= found <= high, f"chi-square {found:.0f} outside of {low:.0f} to {high:.0f}"


# --- how often, and how independently ------------------------------------------------------------------------------

SIDE = 1024


@functools.cache
def many_bits() -> np.ndarray:
    """A mask of 2**20 elements at a rate of 1/2."""
    if not fused_ops.backend.interpreted():
        return kept(SIDE, SIDE, seed=11, dropout_p=0.5)
    with blocks_of(1 << 15):  # on which nothing depends, as a test below has it
        return kept(SIDE, SIDE, seed=11, dropout_p=0.5)


def test_half_of_a_million_bits_are_set() -> None:
    assert_fraction(many_bits(), 0.5)


@pytest.mark.parametrize("length", [2, 4, 8])
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_runs_of_bits_are_all_alike(length: int, offset: int) -> None:
    """Pairs, nibbles and bytes: chi-square of how often each occurs, at any place in a draw of four."""
    bits = many_bits().ravel()[offset:]
    runs = bits[: bits.size // length * length].reshape(-1, length) @ (1 << np.arange(length))
    counts = np.bincount(runs, minlength=2**length)
    assert_chi_square(counts, counts.sum() / counts.size)


@pytest.mark.parametrize("lag", [*range(1, 10), 16, 32, SIDE - 1, SIDE, SIDE + 1, 2048, 4096, 8192, 65536])
def test_elements_at_any_distance_are_uncorrelated(lag: int) -> None:
    """Neighbours of one draw, of the next, of a group, of a thread, a warp and a program, and of the next row."""
    bits = many_bits().ravel()
    assert_uncorrelated(bits[:-lag], bits[lag:])


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_and_columns_keep_as_many_as_chance_has_it(axis: int) -> None:
    """The counts are binomial: as far from half a side as they should be, no further and no nearer."""
    counts = many_bits().sum(axis)
    found, variance = float(((counts - SIDE / 2) ** 2).sum() / (SIDE / 4)), 2 / (9 * SIDE)
    low, high = (SIDE * (1 - variance + sign * SIGMAS * math.sqrt(variance)) ** 3 for sign in (-1, 1))
    assert low <= found <= high


def test_no_draw_repeats() -> None:
    """Of 2**15 runs of 32 bits two are the same by chance in one of eight masks."""
    words = np.packbits(many_bits().ravel()).view(np.uint32)
    expected = words.size**2 / 2**33
    assert words.size - np.unique(words).size <= expected + SIGMAS * math.sqrt(expected)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9])
def test_the_share_that_is_kept(p: float) -> None:
    assert_fraction(kept(1 << 14, dropout_p=p), 1 - p)
    assert_fraction(kept(1 << 12, 1, drop_path_p=p), 1 - p)


@pytest.mark.parametrize("other", [1, 2**32, 2**62])
def test_seeds_that_differ_in_any_bit_are_independent(other: int) -> None:
    """The kernels are given 63 bits, and a key that dropped the high ones would repeat among 2**16 calls."""
    residual = pytest.importorskip("fused_ops.kernels.residual", reason="Triton is not installed")
    from fused_ops.kernels.problem import ResidualAdd

    ones, zeros = torch.ones(1 << 13, device=DEVICE), torch.zeros(1 << 13, device=DEVICE)
    masks = [
        residual.residual_add_forward(ones, zeros, None, torch.tensor([seed], device=DEVICE), ResidualAdd(0.5)).y != 0
        for seed in (0, other)
    ]
    assert_uncorrelated(*(mask.cpu().numpy() for mask in masks))


def test_a_mask_at_a_higher_rate_keeps_a_part_of_it() -> None:
    """One draw, compared with either rate."""
    low, high = (kept(4096, dropout_p=p) for p in (0.2, 0.6))
    assert not (high & ~low).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_what_is_dropped_does_not_depend_on_how_programs_share_the_work(dtype: torch.dtype) -> None:
    if not fused_ops.backend.interpreted():
        pytest.skip("blocks are those of the launcher")
    usual = factors(5, 220, dtype=dtype, **BOTH)
    for elements in (256, 8192):
        with blocks_of(elements):
            assert same_bits(factors(5, 220, dtype=dtype, **BOTH), usual)


# --- samples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4096,), (4096, 1), (512, 3), (64, 5, 7), (16, 8, 3, 3)], ids=short)
def test_drop_path_drops_whole_samples(shape: tuple[int, ...]) -> None:
    mask = kept(*shape, drop_path_p=0.4).reshape(shape[0], -1)
    assert (mask.all(1) | ~mask.any(1)).all() and mask.any() and not mask.all()
    # Between samples nothing repeats.
    assert_uncorrelated(mask[:-1, 0], mask[1:, 0], 0.4)


def test_samples_and_elements_are_independent() -> None:
    """Sample i and elements 4 i to 4 i + 3 have one counter, and sample i and element i one index."""
    samples = kept(4096, drop_path_p=0.5)
    elements = kept(4096, 4, dropout_p=0.5)
    for column in range(4):
        assert_uncorrelated(samples, elements[:, column])
    assert_uncorrelated(samples, elements.ravel()[:4096])


def test_both_drop_what_each_drops_alone() -> None:
    both = factors(40, 30, **BOTH)
    elements, samples = (factors(40, 30, **{name: rate}) for name, rate in BOTH.items())
    torch.testing.assert_close(both, elements * samples, rtol=1e-6, atol=0)
    assert torch.equal(both != 0, (elements != 0) & (samples != 0))


# --- exactness -----------------------------------------------------------------------------------------------------


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 1 / 3, 0.9])
def test_what_is_kept_is_scaled_by_exactly_its_inverse_probability(p: float, dtype: torch.dtype) -> None:
    """1 / (1 - p) in the type of all arithmetic, times x, rounded once to x's type."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    x = normal(600, dtype=dtype)
    torch.manual_seed(3)
    with fused_ops.use_backend("triton"):
        y = F.residual_add(x, torch.zeros_like(x), dropout_p=p)
    mask = factors(600, seed=3, dropout_p=p) != 0
    expected = x.to(compute) * torch.tensor(1 / (1 - p), dtype=compute, device=DEVICE)
    exact = torch.where(mask, expected, 0.0 * x.to(compute))
    if dtype == torch.bfloat16 and fused_ops.backend.interpreted():  # which truncates
        exact = (exact.view(torch.int32) & -0x10000).view(torch.float32)
    assert torch.equal(y, exact.to(dtype))


def test_a_rate_of_zero_is_the_bare_call(each_backend: str) -> None:
    x, residual = normal(5, 40), normal(5, 40, seed=1)
    y = F.residual_add(x, residual, dropout_p=0.0, drop_path_p=0.0)
    assert same_bits(y, residual + x)


def test_a_rate_of_one_keeps_nothing(each_backend: str) -> None:
    x, residual = normal(5, 40), normal(5, 40, seed=1)
    for rates in ({"dropout_p": 1.0}, {"drop_path_p": 1.0}, {"dropout_p": 1, "drop_path_p": 1}):
        assert torch.equal(F.residual_add(x, residual, **rates), residual)
        assert not factors(4097, **rates).any()


# --- forward and backward ------------------------------------------------------------------------------------------


@pytest.mark.one_in(4)
@each_rate(HALVES)
@pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(12, 8, 3, 5), (40, 3, 9, 2)], ids=short)
def test_backward_drops_what_forward_dropped(
    triton_backend: None, shape: tuple[int, ...], scaled: bool, layout: Any, rates: dict[str, float]
) -> None:
    """Element for element and bit for bit: of ones, y and dx are the factor itself."""
    x = layout(torch.ones(shape, device=DEVICE)).requires_grad_()
    scale = torch.ones(shape[1], 1, 1, device=DEVICE, requires_grad=True) if scaled else None
    y = F.residual_add(x, torch.zeros_like(x), scale=scale, **rates)
    wanted = [x] if scale is None else [x, scale]
    dx, *dscale = torch.autograd.grad(y, wanted, torch.ones_like(y))
    assert same_bits(dx, y.detach()) and 0 < int((y == 0).sum()) < y.numel()
    if scaled:
        assert torch.equal(dscale[0].flatten(), y.detach().sum((0, 2, 3)))


@each_rate(BOTH)
def test_backward_may_come_twice_and_late(triton_backend: None, rates: dict[str, float]) -> None:
    """What other calls draw in between changes nothing."""
    x = torch.ones(30, 40, device=DEVICE, requires_grad=True)
    y = F.residual_add(x, torch.zeros_like(x), **rates)
    for _ in range(2):
        F.residual_add(x, x, **rates)
        torch.rand(3)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
        assert same_bits(dx, y.detach())


# --- torch's generator ---------------------------------------------------------------------------------------------


def state() -> Tensor:
    return torch.cuda.get_rng_state() if DEVICE.type == "cuda" else torch.get_rng_state()


@each_rate(BOTH)
def test_manual_seed_governs_what_is_dropped(each_backend: str, rates: dict[str, float]) -> None:
    x, residual = normal(30, 40), normal(30, 40, seed=1)

    def call(seed: int | None = None) -> Tensor:
        if seed is not None:
            torch.manual_seed(seed)
        return F.residual_add(x, residual, activation="gelu", **rates)

    first, second, again, next_again, other = call(5), call(), call(5), call(), call(6)
    assert same_bits(first, again) and same_bits(second, next_again)
    assert not torch.equal(first, second) and not torch.equal(first, other)


@each_rate(BOTH)
def test_a_call_that_drops_moves_the_generator_and_no_other_does(each_backend: str, rates: dict[str, float]) -> None:
    x, residual = normal(4, 8).requires_grad_(), normal(4, 8, seed=1)
    before = state()
    kept_whole = [
        F.residual_add(x, residual, activation="gelu"),
        F.residual_add(x, residual, activation="gelu", dropout_p=0.0, drop_path_p=0.0),
        F.residual_add(x, residual, activation="gelu", **rates, training=False),
    ]
    torch.autograd.grad(kept_whole[0].sum(), x)
    assert torch.equal(state(), before)
    assert same_bits(kept_whole[0], kept_whole[1]) and same_bits(kept_whole[0], kept_whole[2])
    y = F.residual_add(x, residual, **rates)
    after = state()
    assert not torch.equal(after, before)
    torch.autograd.grad(y.sum(), x)
    assert torch.equal(state(), after), "backward drew"


@each_rate(BOTH)
def test_fork_rng_leaves_no_trace(each_backend: str, rates: dict[str, float]) -> None:
    x, residual = normal(30, 40), normal(30, 40, seed=1)
    torch.manual_seed(1)
    expected = F.residual_add(x, residual, **rates)
    torch.manual_seed(1)
    with torch.random.fork_rng():
        assert same_bits(F.residual_add(x, residual, **rates), expected)
    assert same_bits(F.residual_add(x, residual, **rates), expected)


def test_calls_in_a_row_are_independent(triton_backend: None) -> None:
    torch.manual_seed(0)
    ones, zeros = torch.ones(1 << 13, device=DEVICE), torch.zeros(1 << 13, device=DEVICE)
    first, second = ((F.residual_add(ones, zeros, dropout_p=0.3) != 0).cpu().numpy() for _ in range(2))
    assert_uncorrelated(first, second, 0.3)


@pytest.mark.parametrize("training", [True, False])
def test_both_backends_drop_as_often(training: bool, each_backend: str) -> None:
    """The composition's masks are torch's own."""
    torch.manual_seed(0)
    x = torch.ones(128, 64, device=DEVICE)
    y = F.residual_add(x, torch.zeros_like(x), **BOTH, training=training)
    mask = (y != 0).cpu().numpy()
    if not training:
        assert mask.all() and torch.equal(y, x)
        return
    samples = mask.any(1)
    assert_fraction(samples, 0.6)
    assert_fraction(mask[samples], 0.7)


@pytest.mark.usefixtures("triton_backend")
def test_a_scale_with_a_gap_drops_by_torch() -> None:
    case = make_case(*IMAGE, scale=(6, 1, 4))
    assert case.scale is not None and has_gap(tuple(case.scale.shape), IMAGE)
    x = case.x.detach().requires_grad_()
    torch.manual_seed(1)
    y = F.residual_add(x, torch.zeros_like(x), scale=case.scale, dropout_p=0.25)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    dropped = y == 0
    assert 0.05 < dropped.double().mean() < 0.5
    torch.testing.assert_close(y, torch.where(dropped, 0.0, x * case.scale / 0.75))
    torch.testing.assert_close(dx, torch.where(dropped, 0.0, case.scale / 0.75).expand_as(dx))
