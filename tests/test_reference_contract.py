"""What the NumPy reference takes, refuses and imports; its numbers are judged in test_reference.py."""

from __future__ import annotations

import ast
import doctest
import importlib
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fused_ops import reference
from fused_ops.reference.arrays import sum_to

FILES = sorted(Path(reference.__file__).parent.glob("*.py"))
ADD_FUNCTIONS = ["add_layer_norm", "add_rms_norm"]
FUNCTIONS = ["layer_norm", "rms_norm", *ADD_FUNCTIONS]
every_function = pytest.mark.parametrize("function", FUNCTIONS)
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def outputs(function: str, x: Any, residual: Any, normalized_shape: Any, **options: Any) -> tuple[np.ndarray, ...]:
    if function in ADD_FUNCTIONS:
        return getattr(reference, function)(x, residual, normalized_shape, **options)
    return (getattr(reference, function)(x, normalized_shape, residual=residual, **options),)


def gradients(function: str, d_outputs: Any, x: Any, residual: Any, normalized_shape: Any, **options: Any) -> Any:
    backward = getattr(reference, f"{function}_backward")
    if function in ADD_FUNCTIONS:
        return backward(*d_outputs, x, residual, normalized_shape, **options)
    return backward(d_outputs[0], x, normalized_shape, residual=residual, **options)


@every_function
def test_half_input_is_computed_in_float64(function: str) -> None:
    x, residual, weight = (normal(seed, 3, 5).astype(np.float16) for seed in range(3))
    half = outputs(function, x, residual, 5, weight=weight[0], eps=1e-5, activation="gelu")
    wide = [array.astype(np.float64) for array in (x, residual, weight[0])]
    double = outputs(function, wide[0], wide[1], 5, weight=wide[2], eps=1e-5, activation="gelu")
    for y, expected in zip(half, double, strict=True):
        assert y.dtype == np.float64
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)], ids=["dy", "dtotal", "none"])
@pytest.mark.parametrize("function", ADD_FUNCTIONS)
def test_a_gradient_that_did_not_arrive_counts_as_zero(function: str, given: tuple[bool, bool]) -> None:
    x, residual, d, weight = normal(0, 3, 5), normal(1, 3, 5), normal(2, 3, 5), normal(3, 5)
    actual = gradients(function, [d if is_given else None for is_given in given], x, residual, 5, weight=weight)
    expected = gradients(function, [d * is_given for is_given in given], x, residual, 5, weight=weight)
    assert set(actual) == {"dx", "dresidual", "dweight"}
    for name, gradient in actual.items():
        np.testing.assert_array_equal(gradient, expected[name])


@pytest.mark.parametrize("function", ADD_FUNCTIONS)
def test_nan_in_total_stays_out_of_dx_where_y_has_no_gradient(function: str) -> None:
    x, residual, d = normal(0, 3, 5), normal(1, 3, 5), normal(2, 3, 5)
    x[0, 0] = np.nan
    np.testing.assert_array_equal(gradients(function, (None, d), x, residual, 5)["dx"], d)


@every_function
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (2, 0, 3)])
def test_empty(function: str, shape: tuple[int, ...]) -> None:
    x, affine = np.zeros(shape), {"weight": np.ones(shape[-1:])}
    if "layer" in function:
        affine["bias"] = np.ones(shape[-1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = outputs(function, x, x, shape[-1:], activation="gelu", **affine)
        given = gradients(function, [x] * len(result), x, x, shape[-1:], activation="gelu", **affine)
    assert [y.shape for y in result] == [shape] * len(result)
    for name, array in {"x": x, "residual": x, **affine}.items():
        np.testing.assert_array_equal(given[f"d{name}"], np.zeros(array.shape), strict=True)


@every_function
@pytest.mark.parametrize("normalized_shape", [5, (3,), (2, 4), (), (1, 3, 4)])
def test_wrong_normalized_shape_names_both(function: str, normalized_shape: Any) -> None:
    came = f"{normalized_shape}" if isinstance(normalized_shape, tuple) else f"({normalized_shape},)"
    x = np.ones((3, 4))
    with pytest.raises(ValueError) as error:
        outputs(function, x, x, normalized_shape)
    assert f"{function}: normalized_shape" in str(error.value)
    assert f"is {came} while x has shape (3, 4)" in str(error.value)


@pytest.mark.parametrize(
    ("function", "argument"),
    [*((function, "weight") for function in FUNCTIONS), ("layer_norm", "bias"), ("add_layer_norm", "bias")],
)
def test_wrong_shape_of_weight_and_bias_names_both(function: str, argument: str) -> None:
    x = np.ones((3, 4))
    with pytest.raises(ValueError, match=rf"{function}: {argument} must have shape \(4,\), but has shape \(1, 4\)"):
        outputs(function, x, x, 4, **{argument: np.ones((1, 4))})


@every_function
def test_wrong_shape_of_residual_names_both(function: str) -> None:
    with pytest.raises(ValueError, match=rf"{function}: residual must have shape \(3, 4\), but has shape \(4,\)"):
        outputs(function, np.ones((3, 4)), np.ones(4), 4)


@every_function
def test_wrong_shape_of_a_gradient_names_both(function: str) -> None:
    x = np.ones((3, 4))
    with pytest.raises(ValueError, match=rf"{function}: dy must have shape \(3, 4\), but has shape \(4,\)"):
        gradients(function, [np.ones(4), None], x, x, 4)


@pytest.mark.parametrize("function", ADD_FUNCTIONS)
def test_dropout_is_refused_while_training_only(function: str) -> None:
    x, residual = normal(0, 3, 4), normal(1, 3, 4)
    with pytest.raises(NotImplementedError, match=r"dropout_p=0\.5"):
        outputs(function, x, residual, 4, dropout_p=0.5)
    with pytest.raises(NotImplementedError, match=r"dropout_p=0\.5"):
        gradients(function, (x, x), x, residual, 4, dropout_p=0.5)
    with pytest.raises(ValueError, match=r"between 0 and 1, but is 1\.5"):
        outputs(function, x, residual, 4, dropout_p=1.5)
    evaluated = outputs(function, x, residual, 4, dropout_p=0.5, training=False)
    np.testing.assert_array_equal(evaluated, outputs(function, x, residual, 4))


@pytest.mark.parametrize("activation", ["swish", SimpleNamespace(name="prelu", parameters={}), 3, torch.nn.PReLU()])
def test_unknown_activation_names_the_known_ones(activation: Any) -> None:
    with pytest.raises(ValueError, match=r"is unknown; .* relu, relu6, leaky_relu, .*, softplus$"):
        reference.layer_norm(np.ones((2, 3)), 3, activation=activation)


@pytest.mark.parametrize(("name", "known"), [("softplus", "beta, threshold"), ("relu", "none")])
def test_unknown_activation_parameter_names_the_known_ones(name: str, known: str) -> None:
    with pytest.raises(ValueError, match=f"{name!r} has no parameter slope; known ones: {known}$"):
        reference.activation_slope(1.0, SimpleNamespace(name=name, parameters={"slope": 1.0}))


def test_no_activation_is_the_identity_and_a_copy() -> None:
    x = np.array([-1.0, np.nan, 2.0])
    y = reference.activation_value(x, None)
    np.testing.assert_array_equal(y, x)
    assert not np.shares_memory(x, y)
    np.testing.assert_array_equal(reference.activation_slope(x, None), np.ones(3))


@pytest.mark.parametrize("shape", [(4,), (3, 4), (1, 4), (3, 1), (2, 1, 4), (1,), ()])
def test_sum_to_is_the_adjoint_of_a_broadcast(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    narrow, wide = rng.integers(-9, 9, shape).astype(float), rng.integers(-9, 9, (2, 3, 4)).astype(float)
    assert sum_to(wide, shape).shape == shape
    assert (sum_to(wide, shape) * narrow).sum() == (wide * np.broadcast_to(narrow, wide.shape)).sum()


@every_file
def test_imports_numpy_alone(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{file.name}:{node.lineno} reaches out of the reference"
            modules = [node.module or ""] if node.level == 0 else []
        else:
            continue
        for module in modules:
            assert module.split(".")[0] in {"numpy", *sys.stdlib_module_names}, f"{file.name}:{node.lineno}"


@every_file
def test_examples(file: Path) -> None:
    module = importlib.import_module(f"fused_ops.reference.{file.stem}".removesuffix(".__init__"))
    assert doctest.testmod(module).failed == 0
