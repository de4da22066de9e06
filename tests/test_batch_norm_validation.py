"""What a call of batch norm cannot take it refuses before anything runs, in one way in every backend."""

from __future__ import annotations

import inspect
from typing import Any

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
FUNCTIONS = ("batch_norm", "add_batch_norm")
PLAIN, ADDED = FUNCTIONS[:1], FUNCTIONS[1:]
every_function = pytest.mark.parametrize("function", FUNCTIONS)


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
    names = ("running_mean", "running_var", "weight", "bias")
    arguments: dict[str, Any] = {
        "input": tensor(*SHAPE),
        "training": True,
        **{name: tensor(CHANNELS) for name in names},
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
BAD_CALLS = [
    *bad("no dims", "(N, C, *)", "shape ()", input=tensor()),
    *bad("one dim", "(N, C, *)", "(6,)", input=tensor(6)),
    *bad("one value", ONE, "(1, 6, 1)", input=tensor(1, 6, 1)),
    *bad("one row", ONE, "(1, 6)", "training=False", input=tensor(1, 6)),
    *bad("one value in 3-d", ONE, "(1, 6, 1, 1, 1)", input=tensor(1, 6, 1, 1, 1), **NEITHER),
    *bad("no statistics", "training=False", "running_mean is None", training=False, **NEITHER),
    *bad("no running_mean", "running_mean is None", training=False, running_mean=None),
    *bad("no running_var", "running_var is None", "training=True", training=False, running_var=None),
    *bad("running_mean alone", "running_var", "None", running_var=None),
    *bad("running_var alone", "running_mean", "None", running_mean=None),
    *(
        call
        for name in ("weight", "bias", "running_mean", "running_var")
        for shape in [(1,), (7,), (1, 6), (6, 1), ()]
        for call in bad(f"{name} of shape {shape}", name, str(shape), f"({CHANNELS},)", **{name: tensor(*shape)})
    ),
    *(
        call
        for name in ("weight", "bias", "running_mean", "running_var")
        for call in (
            *bad(f"{name} elsewhere", name, "meta", **{name: tensor(CHANNELS, device="meta")}),
            *bad(f"a complex {name}", name, "complex64", **{name: tensor(CHANNELS, dtype=torch.complex64)}),
            *bad(f"an integer {name}", name, "int64", **{name: tensor(CHANNELS, dtype=torch.int64)}),
        )
    ),
    *bad("a mean that learns", "running_mean", "gradient", running_mean=tensor(6).requires_grad_()),
    *bad("a frozen var that learns", "running_var", "detach", running_var=tensor(6).requires_grad_(), training=False),
    *bad("statistics that are one", "running_var", "expanded", "clone", running_var=tensor(1).expand(6)),
    *(
        call
        for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e5m2)
        for call in bad(f"{dtype} input", "input", str(dtype), input=tensor(*SHAPE, dtype=dtype))
    ),
    *bad("eps of 0 in training", "eps", "positive", "0.0", eps=0),
    *bad("a negative eps in training", "eps", "positive", "-1.0", eps=-1.0),
    *bad("a negative eps", "eps", "at least 0", "-0.5", eps=-0.5, training=False),
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


# Parameters of another shape it takes for their number of elements, and then refuses their gradients.
TAKEN_BY_TORCH = {
    "batch_norm-statistics that are one",
    *(f"batch_norm-{name} of shape {shape}" for name in ("weight", "bias") for shape in [(1, 6), (6, 1)]),
}
REFUSED_BY_TORCH = [
    call
    for call in BAD_CALLS
    if call.values[0] in PLAIN
    and not call.values[1].keys() & {"residual", "activation"}
    and call.id not in TAKEN_BY_TORCH
]


@pytest.mark.parametrize(("function", "changes", "received"), REFUSED_BY_TORCH)
def test_whoever_catches_torchs_error_catches_ours(function, changes, received, each_backend):
    with pytest.raises(Exception) as torchs:
        TF.batch_norm(**{**good_arguments(function), **changes})
    kinds = [kind for kind in torchs.type.__mro__ if kind in (ValueError, NotImplementedError, RuntimeError)]
    # The others are accidents, and name no argument.
    assert kinds or torchs.type is IndexError
    assert not kinds or isinstance(refusal(function, **changes), kinds[0])


@every_function
def test_what_is_no_tensor_is_a_type_error(function, each_backend):
    for argument in good_arguments(function):
        if argument != "training":
            error = refusal(function, **{argument: [1.0] * CHANNELS})
            assert isinstance(error, TypeError) and argument in str(error) and "list" in str(error)


@every_function
@pytest.mark.parametrize("argument", ["momentum", "eps"])
@pytest.mark.parametrize("value", [None, [0.1]])
@pytest.mark.parametrize("training", [True, False])
def test_momentum_and_eps_are_numbers(function, argument, value, training, each_backend):
    error = refusal(function, training=training, **{argument: value})
    assert isinstance(error, TypeError) and f"{function}: {argument} must be a number, but is {value}" in str(error)


@pytest.mark.parametrize("value", [None, [0.5], "0.5"])
@pytest.mark.parametrize("training", [True, False])
def test_a_drop_rate_is_a_number(value, training, each_backend):
    error = refusal("add_batch_norm", dropout_p=value, training=training)
    assert isinstance(error, TypeError) and f"dropout_p must be a number, but is {value!r}" in str(error)


@every_function
@pytest.mark.parametrize("changes", [{"weight": tensor(1)}, {"input": tensor(1, 6, 1)}, {"running_var": None}])
def test_a_bad_call_is_refused_while_it_is_traced(function, changes, triton_backend):
    torch._dynamo.reset()

    def call(x: torch.Tensor) -> Any:
        return getattr(F, function)(**{**good_arguments(function), "input": x, **changes})

    with pytest.raises(Exception, match=rf"weight|{ONE}|running_var"):
        torch.compile(call, backend="eager", fullgraph=True)(changes.get("input", tensor(*SHAPE)))
    torch._dynamo.reset()


# --- what is not refused, and signatures ---------------------------------------------------------------------------


def test_torch_takes_these_and_so_do_we():
    """No sample or no position in training, an eps of 0 that divides by given statistics, statistics that learn where
    nothing does, and expanded ones that are not written."""
    with fused_ops.use_backend("torch"):
        mean, var = tensor(CHANNELS), tensor(1).expand(CHANNELS)
        for shape in ((0, 6), (0, 6, 1), (1, 6, 0)):
            x = tensor(*shape)
            torch.testing.assert_close(
                F.batch_norm(x, mean, tensor(6), training=True), TF.batch_norm(x, mean, tensor(6))
            )
        x = tensor(1, 6)
        torch.testing.assert_close(F.batch_norm(x, mean, var, eps=0.0), TF.batch_norm(x, mean, var, eps=0.0))
        with torch.no_grad():
            F.batch_norm(tensor(2, 6), mean.requires_grad_(), tensor(6).requires_grad_(), training=True)


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]


POSITIONAL, KEYWORD = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


def test_the_functions_take_what_torchs_takes():
    of_torch = parameters(TF.batch_norm)
    assert parameters(F.batch_norm) == [*of_torch, ("residual", None, KEYWORD), ("activation", None, KEYWORD)]
    first, *rest = of_torch
    residual = ("residual", inspect.Parameter.empty, POSITIONAL)
    keywords = [("activation", None, KEYWORD), ("dropout_p", 0.0, KEYWORD)]
    assert parameters(F.add_batch_norm) == [first, residual, *rest, *keywords]
