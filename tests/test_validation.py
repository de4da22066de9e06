"""What a call cannot take it refuses before anything runs, naming what came, in one way whichever backend is set."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import nn

import fused_ops
from fused_ops import functional as F
from fused_ops.activation import KNOWN
from tests.norm_cases import DEVICE

ROWS, SPAN = 4, 6
ROW_NORMS = ("layer_norm", "rms_norm")
ADD_NORMS = ("add_layer_norm", "add_rms_norm")
FUNCTIONS = ROW_NORMS + ADD_NORMS


@pytest.fixture(autouse=True)
def no_launch(monkeypatch):
    """Everything here is refused first."""
    launch = pytest.importorskip("fused_ops.kernels.launcher", reason="Triton is not installed")

    def launched(*arguments: Any) -> None:
        pytest.fail("a kernel was launched")

    monkeypatch.setattr(launch.Launcher, "__call__", launched)


def tensor(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = DEVICE) -> torch.Tensor:
    return torch.ones(shape, device=device).to(dtype)


def good_arguments(function: str) -> dict[str, Any]:
    arguments = {"input": tensor(ROWS, SPAN), "normalized_shape": (SPAN,), "weight": tensor(SPAN)}
    if "layer" in function:
        arguments["bias"] = tensor(SPAN)
    if function in ADD_NORMS:
        arguments["residual"] = tensor(ROWS, SPAN)
    return arguments


def refusal(function: str, **changes: Any) -> Exception:
    """What the call raises with these arguments in place of good ones."""
    with pytest.raises(Exception) as caught:
        getattr(F, function)(**{**good_arguments(function), **changes})
    return caught.value


def bad(name: str, *received: str, functions: tuple[str, ...] = FUNCTIONS, **changes: Any) -> Any:
    """A call with these arguments, whose refusal must hold every string of `received`."""
    return [pytest.param(function, changes, received, id=f"{function}-{name}") for function in functions]


LAYER_NORMS = ("layer_norm", "add_layer_norm")
OTHER_SHAPES = [(SPAN,), (1, SPAN), (ROWS, 1), (SPAN, ROWS), (1, ROWS, SPAN), (ROWS, SPAN, 1), (), (0, SPAN)]
NOT_RATES = [-0.1, -1, 1.5, 2, 1.0000001, float("nan"), float("inf"), -float("inf")]
NOT_NUMBERS = [None, [0.5], "0.5", "half", 0.5j, torch.nn.Dropout(0.5)]
NOT_FLOATING = [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]


class Swish(nn.SiLU):
    """A subclass may compute something else."""


BAD_CALLS = [
    *bad("another last dim", "(5,)", f"({ROWS}, {SPAN})", normalized_shape=(5,)),
    *bad("the first dim", f"({ROWS},)", f"({ROWS}, {SPAN})", normalized_shape=(ROWS,)),
    *bad("dims in another order", f"({SPAN}, {ROWS})", normalized_shape=(SPAN, ROWS)),
    *bad("more dims than x has", f"(2, {ROWS}, {SPAN})", normalized_shape=(2, ROWS, SPAN)),
    *bad("an int that is not it", "(5,)", normalized_shape=5),
    *bad("no dims", "()", normalized_shape=()),
    *bad("a list of no dims", "[]", normalized_shape=[]),
    *bad("a 0-d input", "shape ()", input=tensor(), normalized_shape=(1,)),
    *itertools.chain.from_iterable(
        bad(f"residual of shape {shape}", "residual", str(shape), residual=tensor(*shape)) for shape in OTHER_SHAPES
    ),
    *bad("a wider residual", "residual", "torch.float64", residual=tensor(ROWS, SPAN, dtype=torch.float64)),
    *bad("a narrower residual", "residual", "torch.float16", residual=tensor(ROWS, SPAN, dtype=torch.float16)),
    *bad("an integer residual", "residual", "torch.int64", residual=tensor(ROWS, SPAN, dtype=torch.int64)),
    *bad("a residual elsewhere", "residual", "meta", residual=tensor(ROWS, SPAN, device="meta")),
    *bad(
        "a float32 residual added after",
        "residual",
        "torch.float32",
        functions=ROW_NORMS,
        input=tensor(ROWS, SPAN, dtype=torch.bfloat16),
        residual=tensor(ROWS, SPAN),
    ),
    *bad(
        "another half residual",
        "torch.float16",
        "torch.bfloat16",
        input=tensor(ROWS, SPAN, dtype=torch.bfloat16),
        residual=tensor(ROWS, SPAN, dtype=torch.float16),
    ),
    *bad("no residual to add", "residual", "None", functions=ADD_NORMS, residual=None),
    *bad("an unknown name", "'swish'", *KNOWN, activation="swish"),
    *bad("a name in another case", "'ReLU'", *KNOWN, activation="ReLU"),
    *bad("an unknown module", "Softmax(dim=1)", *KNOWN, activation=nn.Softmax(dim=1)),
    *bad("a module with parameters", "PReLU(", *KNOWN, activation=nn.PReLU()),
    *bad("a subclass of a known module", "Swish()", *KNOWN, activation=Swish()),
    *bad("a class", "torch.nn.modules.activation.ReLU", *KNOWN, activation=nn.ReLU),
    *bad("a function", "function relu", *KNOWN, activation=TF.relu),
    *bad("a number", "3", *KNOWN, activation=3),
    *itertools.chain.from_iterable(
        bad(f"{dtype} input", "input", str(dtype), input=tensor(ROWS, SPAN, dtype=dtype)) for dtype in NOT_FLOATING
    ),
    *itertools.chain.from_iterable(
        bad(f"weight of shape {shape}", "weight", f"{shape}", f"({SPAN},)", weight=tensor(*shape))
        for shape in [(1,), (SPAN + 1,), (1, SPAN), (ROWS, SPAN), ()]
    ),
    *bad("a weight elsewhere", "weight", "meta", weight=tensor(SPAN, device="meta")),
    *bad("an integer weight", "weight", "torch.int32", weight=tensor(SPAN, dtype=torch.int32)),
    *bad("a bias of another shape", "bias", "(1,)", f"({SPAN},)", functions=LAYER_NORMS, bias=tensor(1)),
    *bad("a bias elsewhere", "bias", "meta", functions=LAYER_NORMS, bias=tensor(SPAN, device="meta")),
    *bad("a complex bias", "bias", "torch.complex64", functions=LAYER_NORMS, bias=tensor(SPAN, dtype=torch.complex64)),
    *itertools.chain.from_iterable(
        bad(f"a drop rate of {p}", "dropout_p", f"{float(p)}", functions=ADD_NORMS, dropout_p=p) for p in NOT_RATES
    ),
    *bad("a drop rate that nobody uses", "dropout_p", "1.5", functions=ADD_NORMS, dropout_p=1.5, training=False),
]


@pytest.mark.parametrize(("function", "changes", "received"), BAD_CALLS)
def test_a_bad_call_is_refused_by_value_in_every_backend(function, changes, received):
    messages = set()
    for backend in ("torch", "triton", "auto"):
        with fused_ops.use_backend(backend):
            error = refusal(function, **changes)
        assert isinstance(error, ValueError)
        messages.add(f"{type(error).__name__}: {error}")
    (message,) = messages
    for value in (*received, *([] if "activation" in changes else [function])):
        assert value in message


# torch's rms_norm is a composition on a CPU and takes these two; no int is a normalized_shape to torch's functions.
TAKEN_BY_TORCH = ("rms_norm-torch.complex64 input", "rms_norm-an integer weight")
REFUSED_BY_TORCH = [
    call
    for call in BAD_CALLS
    if call.values[0] in ROW_NORMS
    and not call.values[1].keys() & {"residual", "activation"}
    and call.id not in TAKEN_BY_TORCH
    and not isinstance(call.values[1].get("normalized_shape"), int)
]


@pytest.mark.parametrize(("function", "changes", "received"), REFUSED_BY_TORCH)
@pytest.mark.parametrize("affine", [True, False])
def test_whoever_catches_torchs_error_catches_ours(function, changes, received, affine, each_backend):
    arguments = good_arguments(function)
    if not affine:
        arguments = {name: arguments[name] for name in ("input", "normalized_shape")}
    with pytest.raises((RuntimeError, ValueError)) as torchs:
        getattr(TF, function)(**{**arguments, **changes})
    assert isinstance(refusal(function, **changes), torchs.type)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_no_tensor_is_a_type_error(function, each_backend):
    for argument in good_arguments(function):
        if argument != "normalized_shape":
            error = refusal(function, **{argument: [[1.0] * SPAN] * ROWS})
            assert isinstance(error, TypeError) and argument in str(error) and "list" in str(error)


@pytest.mark.parametrize("function", ADD_NORMS)
@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
def test_a_drop_rate_is_a_number(function, value, each_backend):
    error = refusal(function, dropout_p=value)
    assert isinstance(error, TypeError) and f"{function}: dropout_p must be a number, but is {value!r}" in str(error)


@pytest.mark.parametrize("function", ADD_NORMS)
def test_a_drop_rate_is_one_number(function, each_backend):
    value = torch.tensor([0.1, 0.2])
    error = refusal(function, dropout_p=value)
    assert isinstance(error, ValueError) and f"{function}: dropout_p must be one number, but is {value!r}" == str(error)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "AddLayerNorm", "AddRMSNorm"])
def test_modules_refuse_an_activation_when_they_are_made(name):
    with pytest.raises(ValueError, match="'swish'"):
        getattr(fused_ops, name)(SPAN, activation="swish")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_bad_call_is_refused_while_it_is_traced(function, triton_backend):
    def call(x: torch.Tensor) -> Any:
        return getattr(F, function)(**{**good_arguments(function), "input": x, "normalized_shape": (5,)})

    with pytest.raises(Exception, match=r"\(5,\)"):
        torch.compile(call, backend="eager", fullgraph=True)(tensor(ROWS, SPAN))


# --- signatures ----------------------------------------------------------------------------------------------------


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]


POSITIONAL, KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
REQUIRED = inspect.Parameter.empty


@pytest.mark.parametrize("function", ROW_NORMS)
def test_a_function_takes_what_torchs_takes_and_two_keywords(function):
    keywords = [("residual", None, KEYWORD), ("activation", None, KEYWORD)]
    assert parameters(getattr(F, function)) == parameters(getattr(TF, function)) + keywords


@pytest.mark.parametrize("function", ADD_NORMS)
def test_an_add_function_takes_the_residual_second(function):
    first, *rest = parameters(getattr(TF, function.removeprefix("add_")))
    keywords = [("activation", None, KEYWORD), ("dropout_p", 0.0, KEYWORD), ("training", True, KEYWORD)]
    assert parameters(getattr(F, function)) == [first, ("residual", REQUIRED, POSITIONAL), *rest, *keywords]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("normalized_shape", [SPAN, [SPAN], torch.Size([SPAN])], ids=["int", "list", "Size"])
def test_normalized_shape_may_be_any_sequence_or_one_number(function, normalized_shape):
    with fused_ops.use_backend("torch"):
        arguments = good_arguments(function)
        one = getattr(F, function)(**arguments)
        other = getattr(F, function)(**{**arguments, "normalized_shape": normalized_shape})
    torch.testing.assert_close(other, one, rtol=0, atol=0)
