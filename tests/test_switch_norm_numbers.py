"""The numbers of switchable norm's kernels against float64, within the error of a composition in torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.channel_norm_calls import adds_first
from tests.layouts import channels_last
from tests.norm_cases import DTYPES, HALF, TORCH_ACTIVATIONS, normal, same_bits, short, torch_activate
from tests.switch_norm_calls import FUNCTIONS, Leaves, Run, call, composed, each_mode, statistics, tensors
from tests.tolerances import allowed_error, largest_error

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels")

from tests.channel_norm_ways import in_pieces
from tests.dropout_cases import factor
from tests.schedules import forget_schedules

pytestmark = [pytest.mark.one_in(8), pytest.mark.usefixtures("triton_backend", "memory_checked")]

Tensor = torch.Tensor

# Shapes of which hardly a size is a power of two. Pieces are so small that a test's few elements are many of them.
WAYS = {
    "planes": (3, 11, 5, 3),
    "channels_last": (3, 19, 5, 3),
    "vectors": (5, 150),
    "planes in small pieces": (3, 5, 17, 9),
    "channels_last in small pieces": (2, 19, 7, 5),
}
PLACES = [("switch_norm", False), ("switch_norm", True), ("add_switch_norm", True)]


@pytest.fixture
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs switchable norm in the one of WAYS that it is parametrized with."""
    if "pieces" not in request.param:
        yield request.param
        return
    with in_pieces(*((8, 8, 2) if "channels_last" in request.param else (2, 64, 1))):
        forget_schedules()
        yield request.param
    forget_schedules()


def in_ways(*quick: str) -> pytest.MarkDecorator:
    """Runs a test in every way, in all but the quick ones in the long sweep."""
    ways = [
        pytest.param(name, marks=[] if name in quick else pytest.mark.full, id=name.replace(" ", "-")) for name in WAYS
    ]
    return pytest.mark.parametrize("way", ways, indirect=True)


def leaves_of(way: str, function: str, residual: bool, dtype: torch.dtype, parameters: torch.dtype) -> Leaves:
    leaves = {
        name: leaf.detach().to(dtype if name in ("x", "residual") else parameters)
        for name, leaf in tensors(*WAYS[way]).items()
        if residual or name != "residual"
    }
    # So coarse that sums are exact: how they round would decide on which side of a kink an element lies.
    leaves |= {name: (leaves[name] * 8).round() / 8 for name in ("x", "residual") if name in leaves}
    if "channels_last" in way:
        leaves |= {name: channels_last(leaves[name]) for name in ("x", "residual") if name in leaves}
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def stepwise(function: str, training: bool, activation: str | None, running: tuple[Tensor, ...]) -> Run:
    """`composed`, with what is between norm, add and activation in x's type, as between calls of torch."""

    def run(**given: Tensor) -> tuple[Tensor, ...]:
        residual = None if adds_first(function) else given.pop("residual", None)
        y, *total = composed(function, training, None, running)(**given)
        return torch_activate(y if residual is None else y + residual, activation), *total

    return run


def dropping(run: Run, noise: Tensor) -> Run:
    """`run` of an x that was multiplied by what dropout multiplies by, in its own type, as between calls of torch."""
    return lambda x, **others: run(x=x * noise.to(x.dtype), **others)


def check(
    leaves: Leaves,
    function: str,
    training: bool,
    activation: str | None,
    dtype: torch.dtype,
    dropout_p: float = 0.0,
) -> None:
    """Outputs and all gradients."""
    exact_leaves = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    kind, channels = leaves["weight"].dtype, leaves["x"].shape[1]
    arrived = [normal(*leaves["x"].shape, dtype=dtype, seed=20 + i) for i in range(1 + adds_first(function))]
    # Where dresidual is dz, sums are of what was stored there.
    stored = dtype if "residual" in leaves and not adds_first(function) and activation is not None else None
    names = [*("y", "total")[: len(arrived)], *(f"d{name}" for name in leaves)]
    noise = factor(tuple(leaves["x"].shape), dropout_p, seed=5)
    found = []
    for run, given, running in (
        (call, leaves, statistics(channels, kind)),
        (stepwise, leaves, statistics(channels, kind)),
        (composed, exact_leaves, tuple(t.double() for t in statistics(channels, kind))),
    ):
        made = run(function, training, activation, running)
        if dropout_p and run is call:
            torch.manual_seed(5)
            made = call(function, training, activation, running, dropout_p=dropout_p)
        elif dropout_p:
            made = dropping(made, noise)
        outputs = made(**given)
        arriving = [d.to(y.dtype) for d, y in zip(arrived, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, list(given.values()), arriving)
        found.append([output.detach() for output in outputs] + list(gradients))
    for name, actual, eager, expected in zip(names, *found, strict=True):
        terms = leaves["x"].numel() if expected.dim() == 1 else 1
        allowed = allowed_error(eager, expected, actual.dtype, terms, stored)
        if dtype == torch.float64:  # in which the composition is what is exact
            allowed *= 2
        is_mixed = "mean_weight" in name or "var_weight" in name  # differences of sums over everything
        if is_mixed:
            allowed += 2 * torch.finfo(actual.dtype).eps * terms**0.5
        if stored is not None and terms > 1:  # chance decides whose few roundings cancel
            allowed *= 10 if is_mixed else 3
        assert largest_error(actual, expected) <= allowed, name
        if name in ("y", "total", "dx"):
            assert actual.stride() == leaves["x"].stride(), name


def ordinary() -> list[Any]:
    """Every place of the residual, activation of each kind, type, way and mode. Quick are a twelfth."""
    calls = []
    for (index, place), (offset, activation), dtype, (turn, name), training in itertools.product(
        enumerate(PLACES), enumerate((None, "relu", "gelu")), DTYPES, enumerate(WAYS), (True, False)
    ):
        is_quick = (index + offset + turn + DTYPES.index(dtype) + 6 * training) % 12 == 0
        ids = (*place, activation, dtype, name.replace(" ", "-"), "training" if training else "eval")
        marks = [] if is_quick else pytest.mark.full
        calls.append(pytest.param(*place, activation, dtype, name, training, marks=marks, id="-".join(map(short, ids))))
    return calls


@pytest.mark.one_in(6)
@pytest.mark.parametrize(
    ("function", "residual", "activation", "dtype", "way", "training"), ordinary(), indirect=["way"]
)
def test_ordinary_data(
    function: str, residual: bool, activation: str | None, dtype: torch.dtype, way: str, training: bool
) -> None:
    check(leaves_of(way, function, residual, dtype, dtype), function, training, activation, dtype)


@pytest.mark.one_in(30)
@in_ways(*WAYS)
@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_dropout(dtype: torch.dtype, activation: str | None, p: float, way: str) -> None:
    """At a rate of 1/2 totals are exact as well."""
    leaves = leaves_of(way, "add_switch_norm", True, dtype, dtype)
    check(leaves, "add_switch_norm", True, activation, dtype, p)


@in_ways("planes")
@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.full)], ids=["training", "eval"])
def test_every_activation(training: bool, activation: str, way: str) -> None:
    dtype = HALF[list(TORCH_ACTIVATIONS).index(activation) % 2]
    check(leaves_of(way, "switch_norm", True, dtype, torch.float32), "switch_norm", training, activation, dtype)


@in_ways("channels_last")
@each_mode
@pytest.mark.parametrize("function", FUNCTIONS)
def test_without_weight_and_bias(function: str, training: bool, way: str) -> None:
    leaves = leaves_of(way, function, True, torch.float64, torch.float64)
    leaves = {name: leaf for name, leaf in leaves.items() if name not in ("weight", "bias")}
    both = []
    for run in (call, composed):
        outputs = run(function, training, "silu")(**leaves)
        arrived = [normal(*WAYS[way], dtype=torch.float64, seed=20 + i) for i in range(len(outputs))]
        both.append((*outputs, *torch.autograd.grad(outputs, list(leaves.values()), arrived)))
    torch.testing.assert_close(*both, rtol=1e-10, atol=1e-10)


@in_ways("planes", "channels_last in small pieces")
def test_running_statistics_are_torchs(way: str) -> None:
    for momentum in (0.0, 0.3, 1.0):
        leaves = leaves_of(way, "add_switch_norm", True, torch.float32, torch.float32)
        ours, torchs = (statistics(leaves["x"].shape[1], torch.float32) for _ in range(2))
        call("add_switch_norm", True, None, ours, momentum=momentum)(**leaves)
        total = (leaves["residual"] + leaves["x"]).detach()
        torch.nn.functional.batch_norm(total, *torchs, training=True, momentum=momentum)
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-5)


@in_ways("planes")
@pytest.mark.parametrize("function", FUNCTIONS)
@each_mode
def test_only_what_requires_a_gradient_has_one(training: bool, function: str, way: str) -> None:
    whole = leaves_of(way, function, True, torch.float64, torch.float64)
    arrived = [normal(*WAYS[way], dtype=torch.float64, seed=20 + i) for i in range(1 + adds_first(function))]
    gradients = torch.autograd.grad(composed(function, training, "relu")(**whole), list(whole.values()), arrived)
    expected = dict(zip(whole, gradients, strict=True))
    for chosen in (
        ("x",),
        ("residual",),
        ("weight",),
        ("bias",),
        ("mean_weight",),
        ("bias", "var_weight"),
        ("x", "bias"),
    ):
        leaves = {name: leaf.detach().requires_grad_(name in chosen) for name, leaf in whole.items()}
        outputs = call(function, training, "relu")(**leaves)
        asked = [(y, d) for y, d in zip(outputs, arrived, strict=True) if y.requires_grad]
        found = torch.autograd.grad([y for y, _ in asked], [leaves[name] for name in chosen], [d for _, d in asked])
        for name, gradient in zip(chosen, found, strict=True):
            torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-10, msg=name)


@in_ways("planes", "channels_last")
def test_a_large_mean_and_a_small_deviation(way: str) -> None:
    leaves = leaves_of(way, "switch_norm", False, torch.float32, torch.float32)
    leaves["x"] = (leaves["x"].detach() * 1e-2 + 1e4).requires_grad_()
    check(leaves, "switch_norm", True, None, torch.float32)


def test_a_batch_of_many_samples_and_of_one_repeat_their_bits() -> None:
    for shape in ((70, 2, 3, 3), (1, 40, 5, 5)):
        leaves = {name: leaf.detach().float().requires_grad_() for name, leaf in tensors(*shape).items()}
        runs = []
        for _ in range(2):
            outputs = call("switch_norm", True, "relu")(**leaves)
            runs.append((*outputs, *torch.autograd.grad(outputs[0].sum(), list(leaves.values()))))
        assert all(map(same_bits, *runs))
