"""What residual_add cannot take it refuses before anything runs, naming what came, in one way in every backend."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from torch import nn

import fused_ops
from fused_ops import ResidualAdd
from fused_ops import functional as F
from fused_ops.activation import KNOWN
from fused_ops.validation import ArgumentError
from tests.norm_cases import DEVICE

SHAPE = (4, 6, 5)


@pytest.fixture(autouse=True)
def nothing_happens(monkeypatch):
    """Everything here is refused first: before a launch, and before anything is drawn."""
    launch = pytest.importorskip("fused_ops.kernels.launcher", reason="Triton is not installed")

    def launched(*arguments: Any) -> None:
        pytest.fail("a kernel was launched")

    monkeypatch.setattr(launch.Launcher, "__call__", launched)
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before), "torch's generator has moved"


def tensor(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = DEVICE) -> torch.Tensor:
    return torch.ones(shape, device=device).to(dtype)


def good_arguments() -> dict[str, Any]:
    rates = {"dropout_p": 0.5, "drop_path_p": 0.5}
    return {"x": tensor(*SHAPE), "residual": tensor(*SHAPE), "scale": tensor(6, 1), **rates}


def refusal(**changes: Any) -> Exception:
    with pytest.raises(Exception) as caught:
        F.residual_add(**{**good_arguments(), **changes})
    return caught.value


class Swish(nn.SiLU):
    """A subclass may compute something else."""


def bad(name: str, *received: str, **changes: Any) -> Any:
    """A call with these arguments, whose refusal must hold every string of `received`."""
    return pytest.param(changes, received, id=name)


OTHER_SHAPES = [(6, 5), (1, 6, 5), (4, 6, 1), (4, 5, 6), (1, 4, 6, 5), (4, 6, 5, 1), (), (0, 6, 5)]
NO_SCALES = [(4,), (6,), (2, 5), (6, 6), (5, 6), (4, 1), (3, 1, 1), (1, 1, 1, 1), (1, 4, 6, 5), (0,), (4, 6, 0)]
NOT_FLOATING = [torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
RATES = ("dropout_p", "drop_path_p")
NOT_RATES = [-0.1, -1, 1.5, 2, 1.0000001, float("nan"), float("inf"), -float("inf")]

BAD_CALLS = [
    *(bad(f"{rate} of {p}", rate, str(float(p)), **{rate: p}) for rate, p in itertools.product(RATES, NOT_RATES)),
    *(bad(f"a scale of shape {s}", "scale", str(s), str(SHAPE), scale=tensor(*s)) for s in NO_SCALES),
    bad("a scale elsewhere", "scale", "meta", scale=tensor(5, device="meta")),
    *(bad(f"{dtype} scale", "scale", str(dtype), scale=tensor(5, dtype=dtype)) for dtype in NOT_FLOATING),
    *(bad(f"{dtype} x", "x", str(dtype), x=tensor(*SHAPE, dtype=dtype)) for dtype in NOT_FLOATING),
    *(
        bad(f"residual of shape {s}", "residual", str(s), str(SHAPE), "expand", residual=tensor(*s))
        for s in OTHER_SHAPES
    ),
    bad("no residual", "residual", "None", residual=None),
    bad("a wider residual", "residual", "torch.float64", residual=tensor(*SHAPE, dtype=torch.float64)),
    bad("a narrower residual", "residual", "torch.float16", residual=tensor(*SHAPE, dtype=torch.float16)),
    bad("an integer residual", "residual", "torch.int64", residual=tensor(*SHAPE, dtype=torch.int64)),
    bad("a residual elsewhere", "residual", "meta", residual=tensor(*SHAPE, device="meta")),
    bad(
        "another half residual",
        "torch.float16",
        "torch.bfloat16",
        "torch.float32",
        x=tensor(*SHAPE, dtype=torch.bfloat16),
        residual=tensor(*SHAPE, dtype=torch.float16),
    ),
    bad(
        "a float32 residual of float64 x",
        "torch.float32",
        "torch.float64",
        x=tensor(*SHAPE, dtype=torch.float64),
    ),
    bad("drop-path without samples", "drop_path_p=0.5", "no dims", x=tensor(), residual=tensor(), scale=None),
    bad("an unknown name", "'swish'", *KNOWN, activation="swish"),
    bad("a name in another case", "'ReLU'", *KNOWN, activation="ReLU"),
    bad("an unknown module", "Softmax(dim=1)", *KNOWN, activation=nn.Softmax(dim=1)),
    bad("a subclass of a known module", "Swish()", *KNOWN, activation=Swish()),
    bad("a function", "function relu", *KNOWN, activation=TF.relu),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("changes", "received"), BAD_CALLS)
def test_a_bad_call_is_refused_by_value_in_every_backend(changes, received, training):
    messages = set()
    for backend in ("torch", "triton", "auto"):
        with fused_ops.use_backend(backend):
            error = refusal(**changes, training=training)
        assert isinstance(error, ValueError)
        messages.add(f"{type(error).__name__}: {error}")
    (message,) = messages
    for value in (*received, *([] if "activation" in changes else ["residual_add"])):
        assert value in message


@pytest.mark.parametrize("argument", ["x", "residual", "scale"])
def test_what_is_no_tensor_is_a_type_error(argument, each_backend):
    for value in ([1.0], 1.0, "x"):
        error = refusal(**{argument: value})
        assert isinstance(error, TypeError) and argument in str(error) and type(value).__name__ in str(error)


@pytest.mark.parametrize("rate", RATES)
def test_a_rate_that_is_no_number_is_a_type_error(rate, each_backend):
    for value in (None, [0.5], tensor):
        error = refusal(**{rate: value})
        assert isinstance(error, TypeError) and rate in str(error)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(
    "value",
    [torch.tensor([0.1, 0.2]), torch.ones(0), torch.tensor(0.5j), 10**400],
    ids=["several", "none", "complex", "too large"],
)
def test_a_rate_that_cannot_become_one_number_is_named(rate, value, each_backend):
    error = refusal(**{rate: value})
    assert isinstance(error, ArgumentError)
    assert str(error) == f"residual_add: {rate} must be one number, but is {value!r}"


def test_whoever_catches_torchs_error_catches_ours(each_backend):
    """torch's dropout raises a ValueError, its sums and products of what does not broadcast a RuntimeError."""
    with pytest.raises(ValueError):
        TF.dropout(tensor(3), 1.5)
    assert isinstance(refusal(dropout_p=1.5), ValueError)
    with pytest.raises(RuntimeError):
        tensor(*SHAPE) * tensor(4)
    assert isinstance(refusal(scale=tensor(4)), RuntimeError)


def test_arguments_behind_the_residual_are_keywords(each_backend):
    given = list(inspect.signature(F.residual_add).parameters.values())
    assert [(p.name, p.default) for p in given] == [
        ("x", inspect.Parameter.empty),
        ("residual", inspect.Parameter.empty),
        ("activation", None),
        ("scale", None),
        ("dropout_p", 0.0),
        ("drop_path_p", 0.0),
        ("training", True),
    ]
    assert [p.kind for p in given[2:]] == [inspect.Parameter.KEYWORD_ONLY] * 5


def test_a_bad_call_is_refused_while_it_is_traced(triton_backend):
    def call(x: torch.Tensor) -> torch.Tensor:
        return F.residual_add(x, x, scale=x[0, 0, :2])

    with pytest.raises(Exception, match=r"scale must broadcast .*\(2,\)"):
        torch.compile(call, backend="eager", fullgraph=True)(tensor(*SHAPE))


# --- the module ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("p", NOT_RATES)
def test_a_module_refuses_a_rate_when_it_is_made(rate, p):
    with pytest.raises(ValueError, match=rf"ResidualAdd: {rate} .*{float(p)}"):
        ResidualAdd(**{rate: p})


def test_a_module_refuses_an_activation_when_it_is_made():
    with pytest.raises(ValueError, match="'swish'"):
        ResidualAdd("swish")


@pytest.mark.parametrize("scale", [4, 1e-5, (4,), (4, 1.0, 2.0), [], "ab3"], ids=str)
def test_a_module_refuses_a_scale_that_is_no_shape_and_value(scale):
    with pytest.raises(ValueError, match=r"ResidualAdd: scale must be \(shape, initial value\)"):
        ResidualAdd(scale=scale)


@pytest.mark.parametrize("scale", [(2.5, 1.0), ((2, "3"), 1.0), (None, 1.0), (4, None), (4, [1.0])], ids=str)
def test_a_module_refuses_a_shape_or_value_of_another_type(scale):
    with pytest.raises(TypeError, match="scale"):
        ResidualAdd(scale=scale)


@pytest.mark.parametrize("shape", [-1, (4, -1), [-4], True, (4, False)], ids=str)
def test_a_module_refuses_sizes_that_are_none(shape):
    with pytest.raises(ArgumentError) as caught:
        ResidualAdd(scale=(shape, 0.1))
    expected = f"ResidualAdd: the shape of scale must be of integers that are at least 0, but is {shape!r}"
    assert str(caught.value) == expected


def test_a_module_refuses_what_its_scale_does_not_fit(each_backend):
    with pytest.raises(ValueError, match=r"scale .*\(7,\)"):
        ResidualAdd(scale=(7, 1.0), device=DEVICE)(tensor(*SHAPE), tensor(*SHAPE))
    with pytest.raises(TypeError, match="residual"):
        ResidualAdd()(tensor(*SHAPE))
