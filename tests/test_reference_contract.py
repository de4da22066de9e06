"""What the NumPy reference takes, refuses and imports; its numbers are judged in test_reference*.py."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import re
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
ROW_FUNCTIONS = ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"]
GROUP_FUNCTIONS = ["group_norm", "add_group_norm"]
INSTANCE_FUNCTIONS = ["instance_norm", "add_instance_norm"]
BATCH_FUNCTIONS = ["batch_norm", "add_batch_norm"]
SWITCH_FUNCTIONS = ["switch_norm", "add_switch_norm"]
TRAINING_FUNCTIONS = [*BATCH_FUNCTIONS, *SWITCH_FUNCTIONS]
RUNNING_FUNCTIONS = [*INSTANCE_FUNCTIONS, *TRAINING_FUNCTIONS]
FUNCTIONS = [*ROW_FUNCTIONS, *GROUP_FUNCTIONS, *RUNNING_FUNCTIONS]
ADD_FUNCTIONS = [function for function in FUNCTIONS if function.startswith("add_")]
every_function = pytest.mark.parametrize("function", FUNCTIONS)
every_add_function = pytest.mark.parametrize("function", ADD_FUNCTIONS)
every_row_function = pytest.mark.parametrize("function", ROW_FUNCTIONS)
every_group_function = pytest.mark.parametrize("function", GROUP_FUNCTIONS)
every_running_function = pytest.mark.parametrize("function", RUNNING_FUNCTIONS)
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
SHAPE = (3, 4, 5)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def parameters(function: str) -> list[str]:
    if function in SWITCH_FUNCTIONS:
        return ["weight", "bias", "mean_weight", "var_weight"]
    return ["weight"] if "rms" in function else ["weight", "bias"]


def parameter_shape(function: str, argument: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if argument in ("mean_weight", "var_weight"):
        return (3,) if len(shape) > 2 else (2,)
    return shape[-1:] if function in ROW_FUNCTIONS else shape[1:2]


def drawn_parameters(function: str, seed: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: normal(seed, *parameter_shape(function, name, shape)) for name in parameters(function)}


def own(function: str, x: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments that this norm alone cannot do without, unless `options` brings them."""
    if function in ROW_FUNCTIONS:
        return {"normalized_shape": np.shape(x)[-1:], **options}
    if function in GROUP_FUNCTIONS:
        return {"num_groups": 2, **options}
    if function in TRAINING_FUNCTIONS:
        options = {"running_mean": None, "running_var": None, "training": True, **options}
    if function in SWITCH_FUNCTIONS:
        shares = {name: np.ones(parameter_shape(function, name, np.shape(x))) for name in ("mean_weight", "var_weight")}
        options = {"weight": None, "bias": None, **shares, **options}
    return options


def flag(function: str) -> str:
    """The argument that says whether the statistics are x's own."""
    return "training" if function in TRAINING_FUNCTIONS else "use_input_stats"


def outputs(function: str, x: Any, residual: Any, **options: Any) -> tuple[np.ndarray, ...]:
    options = own(function, x, options)
    if function in ADD_FUNCTIONS:
        return getattr(reference, function)(x, residual, **options)
    result = getattr(reference, function)(x, residual=residual, **options)
    return result if isinstance(result, tuple) else (result,)


def gradients(function: str, d_outputs: Any, x: Any, residual: Any, **options: Any) -> Any:
    backward, options = getattr(reference, f"{function}_backward"), own(function, x, options)
    if function in ADD_FUNCTIONS:
        return backward(*d_outputs, x, residual, **options)
    return backward(d_outputs[0], x, residual=residual, **options)


@pytest.mark.parametrize("function", [*FUNCTIONS, "residual_add", "weight_standardize"])
def test_backward_takes_the_gradients_and_then_what_forward_takes(function: str) -> None:
    forward = inspect.signature(getattr(reference, function)).parameters
    backward = dict(inspect.signature(getattr(reference, f"{function}_backward")).parameters)
    d_outputs = ["dy", "dtotal"] if function in ADD_FUNCTIONS else ["dy"]
    assert list(backward) == [*d_outputs, *forward]
    for name, parameter in forward.items():
        assert backward[name] == parameter


@every_function
def test_half_input_is_computed_in_float64(function: str) -> None:
    half = {name: normal(seed, *SHAPE).astype(np.float16) for seed, name in enumerate(("x", "residual"))}
    half |= {name: array.astype(np.float16) for name, array in drawn_parameters(function, 2, SHAPE).items()}
    wide = {name: array.astype(np.float64) for name, array in half.items()}
    options = {"eps": 1e-5, "activation": "gelu"}
    for y, expected in zip(outputs(function, **half, **options), outputs(function, **wide, **options), strict=True):
        np.testing.assert_array_equal(y, expected, strict=True)


@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)], ids=["dy", "dtotal", "none"])
@every_add_function
def test_a_gradient_that_did_not_arrive_counts_as_zero(function: str, given: tuple[bool, bool]) -> None:
    x, residual, d = normal(0, *SHAPE), normal(1, *SHAPE), normal(2, *SHAPE)
    affine = drawn_parameters(function, 3, SHAPE)
    actual = gradients(function, [d if is_given else None for is_given in given], x, residual, **affine)
    expected = gradients(function, [d * is_given for is_given in given], x, residual, **affine)
    assert set(actual) == {"dx", "dresidual", *(f"d{name}" for name in affine)}
    for name, gradient in actual.items():
        np.testing.assert_array_equal(gradient, expected[name], strict=True)


@every_add_function
def test_nan_in_total_stays_out_of_dx_where_y_has_no_gradient(function: str) -> None:
    x, residual, d = normal(0, *SHAPE), normal(1, *SHAPE), normal(2, *SHAPE)
    x[0, 0] = np.nan
    np.testing.assert_array_equal(gradients(function, (None, d), x, residual)["dx"], d)


@every_function
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (2, 0, 3), (0, 4, 3), (2, 4, 0), (0, 0, 0)])
def test_empty(function: str, shape: tuple[int, ...]) -> None:
    if function in INSTANCE_FUNCTIONS and len(shape) == 2:
        shape = (*shape, 2)
    x = np.zeros(shape)
    affine = drawn_parameters(function, 0, shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = outputs(function, x, x, activation="gelu", **affine)
        given = gradients(function, [x] * len(result), x, x, activation="gelu", **affine)
    assert [y.shape for y in result] == [shape] * len(result)
    for name, array in {"x": x, "residual": x, **affine}.items():
        np.testing.assert_array_equal(given[f"d{name}"], np.zeros(array.shape), strict=True)


@every_row_function
@pytest.mark.parametrize("normalized_shape", [5, (3,), (2, 4), (), (1, 3, 4)])
def test_wrong_normalized_shape_names_both(function: str, normalized_shape: Any) -> None:
    came = f"{normalized_shape}" if isinstance(normalized_shape, tuple) else f"({normalized_shape},)"
    x = np.ones((3, 4))
    with pytest.raises(ValueError) as error:
        outputs(function, x, x, normalized_shape=normalized_shape)
    assert f"{function}: normalized_shape" in str(error.value)
    assert f"is {came} while x has shape (3, 4)" in str(error.value)


@every_group_function
@pytest.mark.parametrize("num_groups", [-2, 0, 3, 5, 8])
def test_wrong_num_groups_names_it_and_the_shape(function: str, num_groups: int) -> None:
    x = np.ones(SHAPE)
    with pytest.raises(ValueError) as error:
        outputs(function, x, x, num_groups=num_groups)
    assert f"{function}: num_groups must be 1 at least and divide" in str(error.value)
    assert f"is {num_groups} while x has shape {SHAPE}" in str(error.value)


@pytest.mark.parametrize("num_groups", [2.0, "2", None])
def test_num_groups_is_an_integer(num_groups: Any) -> None:
    with pytest.raises(TypeError):
        reference.group_norm(np.ones(SHAPE), num_groups)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        *((function, shape) for function in [*GROUP_FUNCTIONS, *TRAINING_FUNCTIONS] for shape in ((), (4,))),
        *((function, shape) for function in INSTANCE_FUNCTIONS for shape in ((), (4,), (3, 4))),
    ],
)
def test_too_few_dimensions_name_the_shape(function: str, shape: tuple[int, ...]) -> None:
    least = 3 if function in INSTANCE_FUNCTIONS else 2
    with pytest.raises(ValueError, match=f"{function}: x must have {least} dimensions at least") as error:
        outputs(function, np.ones(shape), np.ones(shape))
    assert str(error.value).endswith(f"has shape {shape}")


TRAINING = {"running_mean": None, "running_var": None, "training": True}


@pytest.mark.parametrize(
    ("function", "shape", "options"),
    [
        *((function, (1, 3), {"num_groups": 3}) for function in GROUP_FUNCTIONS),
        *((function, (1, 3, 1, 1), {"num_groups": 3}) for function in GROUP_FUNCTIONS),
        *((function, (2, 3, 1), {}) for function in INSTANCE_FUNCTIONS),
        *((function, (2, 3, 1, 1), {}) for function in INSTANCE_FUNCTIONS),
        *((function, (1, 3), TRAINING) for function in BATCH_FUNCTIONS),
        *((function, (1, 3, 1, 1), TRAINING) for function in BATCH_FUNCTIONS),
    ],
)
def test_a_single_value_is_refused_where_torch_refuses_it(function: str, shape: Any, options: Any) -> None:
    with pytest.raises(ValueError, match="more than 1"):
        getattr(torch.nn.functional, function.removeprefix("add_"))(torch.ones(shape), **options)
    with pytest.raises(ValueError, match=f"{function}: .*(must have 2|more than 1) .*{re.escape(str(shape))}$"):
        outputs(function, np.ones(shape), np.ones(shape), **options)


@every_running_function
@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
@pytest.mark.parametrize("use_input_stats", [True, False])
def test_one_running_statistic_alone_is_refused(function: str, missing: str, use_input_stats: bool) -> None:
    options = {"running_mean": np.ones(4), "running_var": np.ones(4), missing: None, flag(function): use_input_stats}
    with pytest.raises(ValueError, match=f"{function}: .* must both be given .*, but {missing} alone is None"):
        outputs(function, np.ones(SHAPE), np.ones(SHAPE), **options)


@every_running_function
def test_no_statistics_at_all_are_refused(function: str) -> None:
    x = np.ones(SHAPE)
    for call in (outputs, lambda function, *arrays, **options: gradients(function, [x, x], *arrays, **options)):
        with pytest.raises(ValueError, match=f"{function}: running_mean and running_var must be given where"):
            call(function, x, x, **{flag(function): False})


@every_running_function
@pytest.mark.parametrize("argument", ["running_mean", "running_var"])
def test_wrong_shape_of_a_running_statistic_names_both(function: str, argument: str) -> None:
    running = {"running_mean": np.ones(4), "running_var": np.ones(4), argument: np.ones(5)}
    with pytest.raises(ValueError, match=rf"{function}: {argument} must have shape \(4,\), but has shape \(5,\)"):
        outputs(function, np.ones(SHAPE), np.ones(SHAPE), **running)


@pytest.mark.parametrize(
    ("function", "argument"), [(function, argument) for function in FUNCTIONS for argument in parameters(function)]
)
def test_wrong_shape_of_a_parameter_names_both(function: str, argument: str) -> None:
    x, expected = np.ones(SHAPE), parameter_shape(function, argument, SHAPE)
    with pytest.raises(ValueError) as error:
        outputs(function, x, x, **{argument: np.ones((1, *expected))})
    assert f"{function}: {argument} must have shape {expected}, but has shape {(1, *expected)}" in str(error.value)


@every_function
def test_wrong_shape_of_residual_names_both(function: str) -> None:
    with pytest.raises(ValueError) as error:
        outputs(function, np.ones(SHAPE), np.ones(4))
    assert f"{function}: residual must have shape {SHAPE}, but has shape (4,)" in str(error.value)


@every_function
def test_wrong_shape_of_a_gradient_names_both(function: str) -> None:
    x = np.ones(SHAPE)
    with pytest.raises(ValueError) as error:
        gradients(function, [np.ones(4), None], x, x)
    assert f"{function}: dy must have shape {SHAPE}, but has shape (4,)" in str(error.value)


@every_add_function
def test_wrong_shape_of_the_gradient_of_total_names_both(function: str) -> None:
    x = np.ones(SHAPE)
    with pytest.raises(ValueError) as error:
        gradients(function, [x, np.ones(4)], x, x)
    assert f"{function}: dtotal must have shape {SHAPE}, but has shape (4,)" in str(error.value)


@every_function
@pytest.mark.parametrize("activation", ["swish", SimpleNamespace(name="prelu", parameters={}), 3, torch.nn.PReLU()])
def test_unknown_activation_names_the_known_ones(function: str, activation: Any) -> None:
    x = np.ones(SHAPE)
    with pytest.raises(ValueError, match=r"is unknown; .* relu, relu6, leaky_relu, .*, softplus$"):
        outputs(function, x, x, activation=activation)


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
