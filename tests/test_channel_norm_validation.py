"""What a call of a group or instance norm cannot take it refuses before anything runs, in one way in every backend."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from torch import nn

import fused_ops
from fused_ops import functional as F
from fused_ops.activation import KNOWN
from tests.norm_cases import DEVICE

CHANNELS = 6
SHAPE = (2, CHANNELS, 5)
GROUP, INSTANCE = ("group_norm", "add_group_norm"), ("instance_norm", "add_instance_norm")
NORMS, ADD_NORMS = ("group_norm", "instance_norm"), ("add_group_norm", "add_instance_norm")
FUNCTIONS = NORMS + ADD_NORMS


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
    arguments: dict[str, Any] = {"input": tensor(*SHAPE), "weight": tensor(CHANNELS), "bias": tensor(CHANNELS)}
    if function in GROUP:
        arguments["num_groups"] = 3
    else:
        arguments |= {"running_mean": tensor(CHANNELS), "running_var": tensor(CHANNELS)}
    if function in ADD_NORMS:
        arguments["residual"] = tensor(*SHAPE)
    return arguments


def refusal(function: str, **changes: Any) -> Exception:
    """What the call raises with these arguments in place of good ones; no running statistic has changed."""
    arguments = {**good_arguments(function), **changes}
    with pytest.raises(Exception) as caught:
        getattr(F, function)(**arguments)
    for name in ("running_mean", "running_var"):
        found = arguments.get(name)
        assert not isinstance(found, torch.Tensor) or found.is_meta or bool((found == 1).all())
    return caught.value


def bad(name: str, *received: str, functions: tuple[str, ...] = FUNCTIONS, **changes: Any) -> Any:
    """A call with these arguments, whose refusal must hold every string of `received`."""
    return [pytest.param(function, changes, received, id=f"{function}-{name}") for function in functions]


def each(*groups: Any) -> list[Any]:
    return list(itertools.chain.from_iterable(groups))


OTHER_SHAPES = [(6, 5), (1, 6, 5), (2, 6, 1), (2, 1, 5), (6, 2, 5), (2, 6, 5, 1), (), (0, 6, 5)]
NOT_FLOATING = [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
MORE = "more than one"


def without_statistics(**changes: Any) -> dict[str, Any]:
    return {"running_mean": None, "running_var": None, **changes}


BAD_CALLS = [
    *bad("no groups", "num_groups", "0", functions=GROUP, num_groups=0),
    *bad("fewer groups than none", "num_groups", "-3", functions=GROUP, num_groups=-3),
    *bad("groups that do not divide the channels", "num_groups", "4", "6", str(SHAPE), functions=GROUP, num_groups=4),
    *bad("more groups than channels", "num_groups", "12", "6", functions=GROUP, num_groups=12),
    *bad("a 0-d input", "(N, C, *)", "shape ()", functions=GROUP, input=tensor()),
    *bad("a 1-d input", "(N, C, *)", "shape (6,)", functions=GROUP, input=tensor(6)),
    *bad("a 0-d input", "(N, C, *)", "shape ()", functions=INSTANCE, input=tensor()),
    *bad("a 1-d input", "(N, C, *)", "shape (6,)", functions=INSTANCE, input=tensor(6)),
    *bad("a 1-d input in evaluation", "shape (6,)", functions=INSTANCE, input=tensor(6), use_input_stats=False),
    *bad("a value per group", MORE, "3", "(1, 3)", functions=GROUP, input=tensor(1, 3)),
    *bad("a value per group", MORE, "3", "(1, 3, 1, 1)", functions=GROUP, input=tensor(1, 3, 1, 1)),
    *bad("a value per plane", MORE, "(2, 6, 1)", functions=INSTANCE, input=tensor(2, 6, 1)),
    *bad("a value per plane of 5 dims", MORE, "(2, 6, 1, 1, 1)", functions=INSTANCE, input=tensor(2, 6, 1, 1, 1)),
    *bad("planes without dims", MORE, "(2, 6)", functions=INSTANCE, input=tensor(2, 6)),
    *bad("no samples of one value", MORE, "(0, 6, 1)", functions=INSTANCE, input=tensor(0, 6, 1)),
    *bad("no statistics", "running_mean is None", functions=INSTANCE, **without_statistics(use_input_stats=False)),
    *bad("no running_var", "running_var is None", functions=INSTANCE, running_var=None, use_input_stats=False),
    *bad("running_mean alone", "running_var", "None", functions=INSTANCE, running_var=None),
    *bad("running_var alone", "running_mean", "None", functions=INSTANCE, running_mean=None),
    *each(
        *(
            bad(f"{name} of shape {shape}", name, str(shape), f"({CHANNELS},)", **changes, **{name: tensor(*shape)})
            for shape in [(1,), (7,), (1, 6), (6, 1), ()]
            for name, changes in (
                ("weight", {}),
                ("bias", {}),
                ("running_mean", {"functions": INSTANCE}),
                ("running_var", {"functions": INSTANCE}),
            )
        )
    ),
    *bad("a weight elsewhere", "weight", "meta", weight=tensor(CHANNELS, device="meta")),
    *bad("a bias elsewhere", "bias", "meta", bias=tensor(CHANNELS, device="meta")),
    *bad("statistics elsewhere", "running_mean", "meta", functions=INSTANCE, running_mean=tensor(6, device="meta")),
    *bad("an integer weight", "weight", "torch.int32", weight=tensor(CHANNELS, dtype=torch.int32)),
    *bad("a complex bias", "bias", "torch.complex64", bias=tensor(CHANNELS, dtype=torch.complex64)),
    *bad("integer statistics", "running_var", "int64", functions=INSTANCE, running_var=tensor(6, dtype=torch.int64)),
    *bad(
        "statistics that learn", "running_var", "gradient", functions=INSTANCE, running_var=tensor(6).requires_grad_()
    ),
    *bad("statistics that are one", "running_var", "expanded", functions=INSTANCE, running_var=tensor(1).expand(6)),
    *each(*(bad(f"{dtype} input", "input", str(dtype), input=tensor(*SHAPE, dtype=dtype)) for dtype in NOT_FLOATING)),
    *each(*(bad(f"residual of {s}", "residual", str(s), str(SHAPE), residual=tensor(*s)) for s in OTHER_SHAPES)),
    *bad("a wider residual", "residual", "torch.float64", residual=tensor(*SHAPE, dtype=torch.float64)),
    *bad("a narrower residual", "residual", "torch.float16", residual=tensor(*SHAPE, dtype=torch.float16)),
    *bad("a residual elsewhere", "residual", "meta", residual=tensor(*SHAPE, device="meta")),
    *bad(
        "a float32 residual added after",
        "residual",
        "torch.float32",
        functions=NORMS,
        input=tensor(*SHAPE, dtype=torch.bfloat16),
        residual=tensor(*SHAPE),
    ),
    *bad("no residual to add", "residual", "None", functions=ADD_NORMS, residual=None),
    *bad("an unknown name", "'swish'", *KNOWN, activation="swish"),
    *bad("an unknown module", "Softmax(dim=1)", *KNOWN, activation=nn.Softmax(dim=1)),
    *bad("a negative drop rate", "dropout_p", "-0.1", functions=ADD_NORMS, dropout_p=-0.1),
    *bad("a drop rate above one", "dropout_p", "1.5", functions=ADD_NORMS, dropout_p=1.5),
    *bad("a drop rate of NaN", "dropout_p", "nan", functions=ADD_NORMS, dropout_p=float("nan")),
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


REFUSED_BY_TORCH = [
    call
    for call in BAD_CALLS
    if call.values[0] in NORMS
    and not call.values[1].keys() & {"residual", "activation"}
    and call.id != "instance_norm-integer statistics"  # which torch takes on a CPU
]


@pytest.mark.parametrize(("function", "changes", "received"), REFUSED_BY_TORCH)
def test_whoever_catches_torchs_error_catches_ours(function, changes, received, each_backend):
    with pytest.raises(Exception) as torchs:
        getattr(TF, function)(**{**good_arguments(function), **changes})
    kinds = [kind for kind in torchs.type.__mro__ if kind in (ValueError, NotImplementedError, RuntimeError)]
    # The others are accidents, and name no argument.
    assert kinds or torchs.type in (ZeroDivisionError, IndexError)
    assert not kinds or isinstance(refusal(function, **changes), kinds[0])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_no_tensor_is_a_type_error(function, each_backend):
    for argument in good_arguments(function):
        if argument != "num_groups":
            error = refusal(function, **{argument: [1.0] * CHANNELS})
            assert isinstance(error, TypeError) and argument in str(error) and "list" in str(error)


@pytest.mark.parametrize("function", GROUP)
@pytest.mark.parametrize("groups", [3.0, "3", None, [3]])
def test_a_number_of_groups_is_an_integer(function, groups, each_backend):
    error = refusal(function, num_groups=groups)
    assert isinstance(error, TypeError) and "num_groups" in str(error) and repr(groups) in str(error)


@pytest.mark.parametrize("function", INSTANCE)
def test_a_momentum_is_a_number(function, each_backend):
    error = refusal(function, momentum=None)
    assert isinstance(error, TypeError) and f"{function}: momentum must be a number, but is None" in str(error)


@pytest.mark.parametrize("function", ADD_NORMS)
@pytest.mark.parametrize("value", [None, [0.5], "0.5"])
def test_a_drop_rate_is_a_number(function, value, each_backend):
    error = refusal(function, dropout_p=value)
    assert isinstance(error, TypeError) and f"{function}: dropout_p must be a number, but is {value!r}" in str(error)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_bad_call_is_refused_while_it_is_traced(function, triton_backend):
    torch._dynamo.reset()
    received = "4" if function in GROUP else r"\(1,\)"
    changes = {"num_groups": 4} if function in GROUP else {"weight": tensor(1)}

    def call(x: torch.Tensor) -> Any:
        return getattr(F, function)(**{**good_arguments(function), "input": x, **changes})

    with pytest.raises(Exception, match=received):
        torch.compile(call, backend="eager", fullgraph=True)(tensor(*SHAPE))
    torch._dynamo.reset()


# --- what is not refused, and signatures ---------------------------------------------------------------------------


def test_torch_takes_these_and_so_do_we():
    """A group of one value in a larger batch; integers of other kinds; statistics of one value that are given."""
    with fused_ops.use_backend("torch"):
        x = tensor(2, 3)
        torch.testing.assert_close(F.group_norm(x, 3), TF.group_norm(x, 3))
        torch.testing.assert_close(F.group_norm(tensor(*SHAPE), np.int64(3)), TF.group_norm(tensor(*SHAPE), 3))
        given = {"running_mean": tensor(3), "running_var": tensor(3), "use_input_stats": False}
        torch.testing.assert_close(F.instance_norm(x, **given), TF.instance_norm(x, **given))
        with torch.no_grad():
            mean, var = tensor(6).requires_grad_(), tensor(6).requires_grad_()
            F.instance_norm(tensor(*SHAPE), mean, var)


@pytest.mark.parametrize("name", ["GroupNorm", "InstanceNorm1d", "AddGroupNorm", "AddInstanceNorm3d"])
def test_modules_refuse_an_activation_when_they_are_made(name):
    sizes = (3, 6) if "Group" in name else (6,)
    with pytest.raises(ValueError, match="'swish'"):
        getattr(fused_ops, name)(*sizes, activation="swish")


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]


POSITIONAL, KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
REQUIRED = inspect.Parameter.empty


@pytest.mark.parametrize("function", NORMS)
def test_a_function_takes_what_torchs_takes_and_two_keywords(function):
    keywords = [("residual", None, KEYWORD), ("activation", None, KEYWORD)]
    assert parameters(getattr(F, function)) == parameters(getattr(TF, function)) + keywords


@pytest.mark.parametrize("function", ADD_NORMS)
def test_an_add_function_takes_the_residual_second(function):
    first, *rest = parameters(getattr(TF, function.removeprefix("add_")))
    keywords = [("activation", None, KEYWORD), ("dropout_p", 0.0, KEYWORD), ("training", True, KEYWORD)]
    assert parameters(getattr(F, function)) == [first, ("residual", REQUIRED, POSITIONAL), *rest, *keywords]
