"""What the reference is judged by: torch's activations and norms, derived tolerances, finite differences, exact
arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import isqrt
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fused_ops import reference

Arrays = dict[str, np.ndarray]
EPS = float(np.finfo(np.float64).eps)
INF, NAN = float("inf"), float("nan")

TORCH_ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "softplus": F.softplus,
}
# Where a slope jumps or a piece begins; smooth activations have none.
KINKS = {
    "relu": [0.0],
    "relu6": [0.0, 6.0],
    "leaky_relu": [0.0],
    "elu": [0.0],
    "selu": [0.0],
    "hardswish": [-3.0, 3.0],
    "hardsigmoid": [-3.0, 3.0],
}
ACTIVATIONS = [SimpleNamespace(name=name, parameters={}) for name in TORCH_ACTIVATIONS] + [
    SimpleNamespace(name="leaky_relu", parameters={"negative_slope": 0.3}),
    SimpleNamespace(name="elu", parameters={"alpha": 1.7}),
    SimpleNamespace(name="softplus", parameters={"beta": 2.0, "threshold": 3.0}),
]


def label(activation: Any) -> str:
    if activation is None:
        return "identity"
    return "-".join([activation.name, *map(str, activation.parameters.values())])


def kinks(activation: Any) -> list[float]:
    if activation is None:
        return []
    if activation.name == "softplus" and activation.parameters:
        return [activation.parameters["threshold"] / activation.parameters["beta"]]
    return KINKS.get(activation.name, [])


def torch_activation(activation: Any, x: torch.Tensor) -> torch.Tensor:
    return x if activation is None else TORCH_ACTIVATIONS[activation.name](x, **activation.parameters)


def float64_activation(activation: Any, x: torch.Tensor) -> torch.Tensor:
    """torch's activation; hardsigmoid composed, since F.hardsigmoid's slope is float32's 1 / 6 even in float64."""
    if activation is not None and activation.name == "hardsigmoid":
        return F.relu6(x + 3) / 6
    return torch_activation(activation, x)


def assert_within(tolerance: Any, expected: torch.Tensor, actual: np.ndarray) -> None:
    """|actual - expected| <= tolerance elementwise; NaN and Inf in the same places."""
    e = expected.detach().numpy()
    assert actual.dtype == np.float64
    assert actual.shape == e.shape
    finite = np.isfinite(e)
    np.testing.assert_array_equal(actual[~finite], e[~finite])
    excess = np.abs(actual[finite] - e[finite]) - np.broadcast_to(tolerance, e.shape)[finite]
    assert (excess <= 0.0).all(), f"{excess.max():.3g} beyond the tolerance"


SILU = SimpleNamespace(name="silu", parameters={})
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS, ids=label)
every_activation_and_none = pytest.mark.parametrize("activation", [None, *ACTIVATIONS], ids=label)


# ---- finite differences ----

# Balances the truncation error of the extrapolated difference, STEP^4, with its rounding, EPS / STEP.
STEP = EPS**0.2


def assert_matches_differences(
    outputs_of: Callable[[Arrays], tuple[np.ndarray, ...]],
    arrays: Arrays,
    d_outputs: tuple[np.ndarray, ...],
    gradients: Arrays,
) -> None:
    """`gradients` holds, for each of `arrays`, the derivative of the sum of d_outputs * outputs_of(arrays)."""
    assert set(gradients) == {f"d{name}" for name in arrays}

    def loss(changed: Arrays) -> float:
        return sum(float((d * output).sum()) for d, output in zip(d_outputs, outputs_of(changed), strict=True))

    # Each product of a loss, of which two outputs have 2 x size, is known to some 20 roundings of up to
    # max |d| max |output|.
    outputs = np.abs(np.asarray(outputs_of(arrays))).max()
    noise = 2 * d_outputs[0].size * 20 * EPS * max(np.abs(d).max() for d in d_outputs) * max(1.0, outputs)
    for name, array in arrays.items():
        assert gradients[f"d{name}"].shape == array.shape
        for index in np.ndindex(array.shape):
            coarse, fine = (difference(loss, arrays, name, index, step) for step in (STEP, STEP / 2))
            # The error of `fine` is a third of coarse - fine up to STEP^4: what is left is below that third.
            tolerance = abs(coarse - fine) / 3 + 4 * noise / STEP
            assert tolerance < 1e-4 * max(1.0, abs(fine)), "too coarse to find a wrong formula"
            assert abs(gradients[f"d{name}"][index] - (fine + (fine - coarse) / 3)) <= tolerance, (name, index)


def difference(
    of: Callable[[Arrays], float],
    arrays: Arrays,
    name: str,
    index: Any,
    step: float,
) -> float:
    up, down = stepped(arrays, name, index, step), stepped(arrays, name, index, -step)
    return (of(up) - of(down)) / (up[name][index] - down[name][index])


def stepped(arrays: Arrays, name: str, index: Any, step: float) -> Arrays:
    changed = arrays[name].copy()
    changed[index] += step
    return {**arrays, name: changed}


# ---- spans that are hard to normalize ----

HARD_SPANS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "large mean": lambda span: 1e4 + 1e-2 * span,
    "constant": lambda span: np.full_like(span, 3.7),
    "zero": np.zeros_like,
    "huge": lambda span: 3e38 * span,
    "nan": lambda span: np.where(np.arange(span.size) == 2, NAN, span),
    "inf": lambda span: np.where(np.arange(span.size) == 2, INF, span),
    "both infs": lambda span: np.where(np.arange(span.size) < 2, [INF, -INF] * (span.size // 2), span),
}


def largest(*values: Any) -> float:
    """The largest finite magnitude, at least 1."""
    finite = (value[np.isfinite(value)] for value in map(np.asarray, values))
    return max(1.0, *(np.abs(value).max(initial=0.0) for value in finite))


def exactly_standardized(span: np.ndarray) -> np.ndarray:
    """(span - mean) / sqrt(var) in exact arithmetic, rounded once."""
    exact = [Fraction(value) for value in span]
    deviation = [value - sum(exact) / len(exact) for value in exact]
    variance = sum(value**2 for value in deviation) / len(exact)
    root = Fraction(isqrt(int(variance * 10**60)), 10**30)  # good to 1e-28 of a spread of 1e-2
    return np.array([float(value / root) for value in deviation])


# ---- norms whose parameters have one element a channel ----

# A kind is the name of a function, and after a space, if it normalizes in more than one way, in which.
AFFINE = {"bare": (), "weight": ("weight",), "bias": ("bias",), "affine": ("weight", "bias")}


def parametrized_kinds(kinds: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.replace(" ", "-"))


def parametrized_cases(kinds: list[str], affine: Sequence[str] = tuple(AFFINE)) -> pytest.MarkDecorator:
    """Every kind with every choice of parameters, with and without a residual."""
    cases = [
        pytest.param(kind, each, residual, id=f"{kind}-{each}{'-residual' * residual}".replace(" ", "-"))
        for kind in kinds
        for each in affine
        for residual in ((True,) if kind.startswith("add_") else (False, True))
    ]
    return pytest.mark.parametrize(("kind", "affine", "residual"), cases)


def draw(seed: int, shape: tuple[int, ...], affine: str, residual: bool) -> Arrays:
    rng = np.random.default_rng(seed)
    arrays = {"x": rng.normal(0.5, 2.0, shape)}
    if residual:
        arrays["residual"] = rng.normal(0.0, 4.0, shape)
    for name in AFFINE[affine]:
        arrays[name] = rng.normal(0.0, 4.0, shape[1:2])
    return arrays


def call(kind: str, arrays: Arrays, *gradients: Any, backward: bool = False, **options: Any) -> Any:
    arguments = dict(arrays)
    x = [arguments.pop("x")] + ([arguments.pop("residual")] if kind.startswith("add_") else [])
    function = getattr(reference, kind.split()[0] + "_backward" * backward)
    return function(*gradients, *x, **{**options, **arguments})


def outputs_of(kind: str, arrays: Arrays, **options: Any) -> tuple[np.ndarray, ...]:
    """(y,) or (y, total)."""
    outputs = call(kind, arrays, **options)
    return outputs[: 1 + kind.startswith("add_")] if isinstance(outputs, tuple) else (outputs,)


def total_of(kind: str, arrays: Arrays) -> np.ndarray:
    return arrays["x"] + arrays["residual"] if kind.startswith("add_") else arrays["x"]


def drawn_off_kinks(kind: str, activation: Any, draw_with: Callable[[int], Arrays], options: dict[str, Any]) -> Arrays:
    """The first draw that reaches every piece of the activation, with no kink where a step could cross it.

    Whether one could is tried out, with steps twice as large in every element of every argument.
    """

    def pieces(arrays: Arrays) -> np.ndarray:
        return np.digitize(outputs_of(kind, arrays, **options)[0], kinks(activation))

    for seed in range(1000):
        arrays = draw_with(seed)
        scaled = "weight" in arrays or "bias" in arrays or ("residual" in arrays and not kind.startswith("add_"))
        here = pieces(arrays)
        if scaled and len(np.unique(here)) <= len(kinks(activation)):
            continue
        steps = ((name, index, side) for name in arrays for index in np.ndindex(arrays[name].shape) for side in (-2, 2))
        if all((pieces(stepped(arrays, name, index, side * STEP)) == here).all() for name, index, side in steps):
            return arrays
    raise AssertionError("no draw is clear of the kinks")


def as_torch(options: dict[str, Any]) -> dict[str, Any]:
    """The same with tensors, which torch may change, in place of arrays."""
    return {name: torch.tensor(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}


def switch_spans(x: Any, training: bool) -> list[tuple[int, ...]]:
    """The dims of each of switchable norm's statistics that are those of x: instance, layer, batch."""
    positions = tuple(range(2, x.ndim))
    spans = [positions] * bool(positions) + [(1, *positions)]
    return spans + [(0, *positions)] * training


def torch_switch_norm(eps: float = 1e-5, **options: Any) -> Callable[..., torch.Tensor]:
    """The formula of the paper, differentiated by torch."""

    def norm(x: torch.Tensor, mean_weight: torch.Tensor, var_weight: torch.Tensor, **affine: Any) -> torch.Tensor:
        def by_channel(values: torch.Tensor) -> torch.Tensor:
            return values.reshape(-1, *[1] * (x.ndim - 2))

        spans = switch_spans(x, options["training"])
        moments = [torch.var_mean(x, dim=dims, correction=0, keepdim=True) for dims in spans]
        if not options["training"]:
            moments.append((by_channel(options["running_var"]), by_channel(options["running_mean"])))
        mean = sum(share * mean for share, (_, mean) in zip(mean_weight.softmax(0), moments, strict=True))
        var = sum(share * var for share, (var, _) in zip(var_weight.softmax(0), moments, strict=True))
        y = (x - mean) / (var + eps).sqrt()
        y = y * by_channel(affine["weight"]) if "weight" in affine else y
        return y + by_channel(affine["bias"]) if "bias" in affine else y

    return norm


def torch_dropout(seed: int, x: torch.Tensor, p: float) -> torch.Tensor:
    """torch's dropout of x with the mask that `seed` draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return F.dropout(x, p)


def drawn_mask(seed: int, shape: tuple[int, ...], p: float) -> np.ndarray:
    """The mask that `seed` draws."""
    return torch_dropout(seed, torch.ones(shape, dtype=torch.float64), p).numpy() != 0.0


def torch_outputs(
    kind: str,
    norm: Callable[..., torch.Tensor],
    leaves: dict[str, torch.Tensor],
    activation: Any = None,
    dropout: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, ...]:
    """The outputs of torch's composition around `norm`, which takes the total and all leaves but x and residual."""
    learned = dict(leaves)
    x, residual = learned.pop("x"), learned.pop("residual", None)
    x = x if dropout is None else dropout(x)
    added = kind.startswith("add_")
    total = x + residual if added and residual is not None else x
    y = norm(total, **learned)
    y = float64_activation(activation, y if added or residual is None else y + residual)
    return (y, total) if added else (y,)


def assert_norm_matches_torch(
    kind: str,
    arrays: Arrays,
    norm: Callable[..., torch.Tensor],
    means: list[np.ndarray],
    spread: np.ndarray,
    span: int,
    activation: Any,
    options: dict[str, Any],
    dropout: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Outputs and gradients against torch's. The tolerance follows the errors through the formulas.

    `means` are all that are subtracted, `spread` is the root of the variance and of eps, as they broadcast to x;
    `span` is the largest number of elements that a mean is taken of.

    Each of the two results takes at most span + terms + 20 roundings one after another, terms being those of
    dweight. An element of x_hat is as uncertain as x and its means are in units of the spread, whence an error of z.
    Slopes and their own slopes are below 2. A term of dx or dweight is a product of dz, weight, x_hat twice, and
    rstd or terms; one of the gradient of a share of a mean has that mean, in units of the spread. Dropout hands dx on
    times 1 / (1 - dropout_p).
    """
    leaves = {name: torch.tensor(array, requires_grad=True) for name, array in arrays.items()}
    expected = torch_outputs(kind, norm, leaves, activation, dropout)
    rng = np.random.default_rng(3)
    d_outputs = [rng.normal(size=arrays["x"].shape) for _ in expected]
    expected_gradients = torch.autograd.grad(expected, list(leaves.values()), list(map(torch.tensor, d_outputs)))
    outputs = outputs_of(kind, arrays, activation=activation, **options)
    gradients = call(kind, arrays, *d_outputs, backward=True, activation=activation, **options)

    total = expected[-1].detach().numpy() if kind.startswith("add_") else arrays["x"]
    kept = 1.0 / (1.0 - options.get("dropout_p", 0.0))
    learns_shares = "mean_weight" in arrays
    terms = total.size if learns_shares else total.size // total.shape[1]
    with np.errstate(invalid="ignore"):
        x_hat = largest(np.sqrt(span), *((total - mean) / spread for mean in means))
        uncertainty = largest(total / spread, *(mean / spread for mean in means))
    weight = largest(arrays.get("weight", 1.0))
    added = largest(arrays.get("residual", 0.0), arrays.get("bias", 0.0))
    z_error = 2 * (span + terms + 20) * EPS * (uncertainty * x_hat * weight + added)
    for e, y in zip(expected, outputs, strict=True):
        assert_within(2 * z_error, e, y)
    assert set(gradients) == {f"d{name}" for name in arrays}
    gradient_error = 8 * z_error * largest(*d_outputs) * weight * x_hat**2 * max(largest(1 / spread), terms) * kept
    for name, e in zip(leaves, expected_gradients, strict=True):
        error = gradient_error * (uncertainty if name == "mean_weight" else 1.0)
        assert_within(error, e, gradients[f"d{name}"])


def assert_running_statistics_match(
    expected: dict[str, Any], statistics: Sequence[np.ndarray], count: int, *values: Any
) -> None:
    """Sums of at most `count` terms and some 10 roundings more; every term of a variance is below 4 x^2."""
    mean, var = statistics
    error, size = 2 * (count + 10) * EPS, largest(*values)
    assert_within(error * size, expected["running_mean"], mean)
    assert_within(error * largest(4 * size**2), expected["running_var"], var)
