"""What a call of switchable norm cannot take it refuses before anything runs, in one way in every backend."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

import fused_ops
from fused_ops import functional as F
from fused_ops.activation import KNOWN
from tests.norm_cases import DEVICE

CHANNELS = 6
SHAPE = (2, CHANNELS, 5)
FUNCTIONS = ("switch_norm", "add_switch_norm")
PLAIN, ADDED = FUNCTIONS[:1], FUNCTIONS[1:]
BY_CHANNEL = ("running_mean", "running_var", "weight", "bias")
SHARES = ("mean_weight", "var_weight")
every_function = pytest.mark.parametrize("function", FUNCTIONS)


def tensor(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = DEVICE) -> torch.Tensor:
    return torch.ones(shape, device=device).to(dtype)


def good_arguments(function: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "input": tensor(*SHAPE),
        "training": True,
        **{name: tensor(CHANNELS) for name in BY_CHANNEL},
        **{name: tensor(3) for name in SHARES},
    }
    return arguments | ({"residual": tensor(*SHAPE)} if function in ADDED else {})


def refusal(function: str, **changes: Any) -> Exception:
    """What the call raises with these arguments in place of good ones; no running statistic has changed."""
    arguments = {**good_arguments(function), **changes}
    with pytest.raises(Exception) as caught:
        getattr(F, function)(**arguments)
    for name in ("running_mean", "running_var"):
        found = arguments.get(name)
        assert not isinstance(found, torch.Tensor) or found.is_meta or bool((found == 1).all())
    return caught.value


def bad(name: str, *received: str, functions: tuple[str, ...] = FUNCTIONS, **changes: Any) -> list[Any]:
    """A call with these arguments, whose refusal must hold every string of `received`."""
    return [pytest.param(function, changes, received, id=f"{function}-{name}") for function in functions]


ONE = "more than 1 value per channel when training"
NEITHER = {"running_mean": None, "running_var": None}
ROWS = {"input": tensor(2, 6), "residual": tensor(2, 6)}
BAD_CALLS = [
    *bad("no dims", "(N, C, *)", "shape ()", input=tensor()),
    *bad("one dim", "(N, C, *)", "(6,)", input=tensor(6)),
    *bad("one value", ONE, "(1, 6, 1)", input=tensor(1, 6, 1)),
    *bad("one row", ONE, "(1, 6)", "training=False", input=tensor(1, 6)),
    *bad("one value in 3-d", ONE, "(1, 6, 1, 1, 1)", input=tensor(1, 6, 1, 1, 1), **NEITHER),
    *bad("no statistics", "training=False", "running_mean is None", training=False, **NEITHER),
    *bad("no running_mean", "running_mean is None", training=False, running_mean=None),
    *bad("running_mean alone", "running_var", "None", running_var=None),
    *bad("running_var alone", "running_mean", "None", running_mean=None),
    *(
        call
        for name in BY_CHANNEL
        for shape in [(1,), (7,), (1, 6), ()]
        for call in bad(f"{name} of shape {shape}", name, str(shape), f"({CHANNELS},)", **{name: tensor(*shape)})
    ),
    *(
        call
        for name in SHARES
        for call in (
            *bad(f"two of {name}", name, "(3,) (Instance, Layer, Batch)", "(2,)", str(SHAPE), **{name: tensor(2)}),
            *bad(f"four of {name}", name, "(3,)", "(4,)", "pass one number for each", **{name: tensor(4)}),
            *bad(f"{name} of two dims", name, "(3,)", "(1, 3)", **{name: tensor(1, 3)}),
            *bad(f"{name} of no dims", name, "(3,)", "shape ()", **{name: tensor()}),
            *bad(f"three of {name} for rows", name, "(2,) (Layer, Batch)", "(3,)", "last two", "(2, 6)", **ROWS)
            * (name == "mean_weight"),
            *bad(f"one of {name} for rows", name, "(2,)", "(1,)", **ROWS, mean_weight=tensor(2), var_weight=tensor(1))
            * (name == "var_weight"),
        )
    ),
    *(
        call
        for name, count in (*((name, CHANNELS) for name in BY_CHANNEL), *((name, 3) for name in SHARES))
        for call in (
            *bad(f"{name} elsewhere", name, "meta", **{name: tensor(count, device="meta")}),
            *bad(f"a complex {name}", name, "complex64", **{name: tensor(count, dtype=torch.complex64)}),
            *bad(f"an integer {name}", name, "int64", **{name: tensor(count, dtype=torch.int64)}),
        )
    ),
    *bad("a mean that learns", "running_mean", "gradient", running_mean=tensor(6).requires_grad_()),
    *bad("a frozen var that learns", "running_var", "detach", running_var=tensor(6).requires_grad_(), training=False),
    *bad("statistics that are one", "running_var", "expanded", "clone", running_var=tensor(1).expand(6)),
    *(
        call
        for dtype in (torch.int64, torch.bool, torch.complex64)
        for call in bad(f"{dtype} input", "input", str(dtype), input=tensor(*SHAPE, dtype=dtype))
    ),
    *bad("a negative eps", "eps", "at least 0", "-1.0", eps=-1.0),
    *bad("a negative eps in evaluation", "eps", "at least 0", "-0.5", eps=-0.5, training=False),
    *(
        call
        for shape in [(1, 6, 5), (2, 6, 1), (6, 5), (2, 6, 5, 1)]
        for call in bad(f"residual of {shape}", "residual", str(shape), str(SHAPE), residual=tensor(*shape))
    ),
    *bad("a wider residual", "residual", "torch.float64", residual=tensor(*SHAPE, dtype=torch.float64)),
    *bad("a residual elsewhere", "residual", "meta", residual=tensor(*SHAPE, device="meta")),
    *bad(
        "a float32 residual added after",
        "residual",
        "torch.float32",
        functions=PLAIN,
        input=tensor(*SHAPE, dtype=torch.bfloat16),
        residual=tensor(*SHAPE),
    ),
    *bad("no residual to add", "residual", "None", functions=ADDED, residual=None),
    *bad("an unknown name", "'swish'", *KNOWN, activation="swish"),
    *bad("an unknown module", "Softmax(dim=1)", *KNOWN, activation=nn.Softmax(dim=1)),
    *bad("a negative drop rate", "dropout_p", "-0.1", functions=ADDED, dropout_p=-0.1),
    *bad("a drop rate above one", "dropout_p", "1.5", functions=ADDED, dropout_p=1.5),
    *bad("a drop rate of NaN", "dropout_p", "nan", functions=ADDED, dropout_p=float("nan")),
    *bad("a drop rate that nobody uses", "dropout_p", "1.5", functions=ADDED, dropout_p=1.5, training=False),
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


@every_function
def test_one_value_a_channel_is_batch_norms_error(function):
    error = refusal(function, input=tensor(1, 6, 1))
    with pytest.raises(type(error)) as of_batch_norm:
        F.batch_norm(tensor(1, 6, 1), None, None, training=True)
    assert str(error) == str(of_batch_norm.value).replace("batch_norm", function, 1)


@every_function
def test_what_is_no_tensor_is_a_type_error(function):
    for argument in good_arguments(function):
        if argument != "training":
            error = refusal(function, **{argument: [1.0] * CHANNELS})
            assert isinstance(error, TypeError) and argument in str(error) and "list" in str(error)
    for argument in SHARES:
        error = refusal(function, **{argument: None})
        assert isinstance(error, TypeError) and argument in str(error) and "NoneType" in str(error)


@every_function
@pytest.mark.parametrize("argument", ["momentum", "eps"])
@pytest.mark.parametrize("value", [None, [0.1]])
@pytest.mark.parametrize("training", [True, False])
def test_momentum_and_eps_are_numbers(function, argument, value, training):
    error = refusal(function, training=training, **{argument: value})
    assert isinstance(error, TypeError) and f"{function}: {argument} must be a number, but is {value}" in str(error)


@pytest.mark.parametrize("value", [None, [0.5], "0.5"])
@pytest.mark.parametrize("training", [True, False])
def test_a_drop_rate_is_a_number(value, training):
    error = refusal("add_switch_norm", dropout_p=value, training=training)
    assert isinstance(error, TypeError) and f"dropout_p must be a number, but is {value!r}" in str(error)


@every_function
@pytest.mark.parametrize("changes", [{"mean_weight": tensor(2)}, {"input": tensor(1, 6, 1)}, {"running_var": None}])
def test_a_bad_call_is_refused_while_it_is_traced(function, changes):
    torch._dynamo.reset()

    def call(x: torch.Tensor) -> Any:
        return getattr(F, function)(**{**good_arguments(function), "input": x, **changes})

    with pytest.raises(Exception, match=rf"mean_weight|{ONE}|running_var"):
        torch.compile(call, backend="eager", fullgraph=True)(changes.get("input", tensor(*SHAPE)))
    torch._dynamo.reset()


# --- what is not refused, and signatures ---------------------------------------------------------------------------


def test_what_a_single_sample_and_an_eps_of_zero_need_not_be_refused_for():
    with fused_ops.use_backend("torch"):
        mean, var, pair, three = tensor(CHANNELS), tensor(1).expand(CHANNELS), tensor(2), tensor(3)
        row = torch.arange(6.0, device=DEVICE)[None]
        assert F.switch_norm(row, mean, var, None, None, pair, pair, eps=0.0).isfinite().all()
        one = F.switch_norm(row[..., None], mean, var, None, None, three, three, training=False)
        assert one.shape == (1, 6, 1) and one.isfinite().all()
        x = row.view(1, 3, 2).expand(2, 3, 2)
        assert F.switch_norm(x, None, None, None, None, three, three, training=True, eps=0.0).isfinite().all()


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]


def test_the_functions_take_what_batch_norm_takes_and_the_shares():
    required, keyword = inspect.Parameter.empty, inspect.Parameter.KEYWORD_ONLY
    for function in FUNCTIONS:
        of_batch_norm = parameters(getattr(F, function.replace("switch", "batch")))
        expected = [
            (name, required if name in ("weight", "bias") else default, kind) for name, default, kind in of_batch_norm
        ]
        at = [name for name, *_ in expected].index("training")
        expected[at:at] = [(name, required, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in SHARES]
        assert parameters(getattr(F, function)) == expected
        assert expected[-1][2] is keyword
