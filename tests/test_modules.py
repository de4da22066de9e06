"""The modules: torch.nn's own constructors, parameters and state, with an activation and a residual on top."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fused_ops
from fused_ops import Activation, AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm
from fused_ops import functional as F
from fused_ops.modules.base import Extending
from tests.calls import as_tuple
from tests.norm_cases import DEVICE

Tensor = torch.Tensor

TORCHS = {LayerNorm: nn.LayerNorm, AddLayerNorm: nn.LayerNorm, RMSNorm: nn.RMSNorm, AddRMSNorm: nn.RMSNorm}
FUNCTIONS = {
    LayerNorm: F.layer_norm,
    AddLayerNorm: F.add_layer_norm,
    RMSNorm: F.rms_norm,
    AddRMSNorm: F.add_rms_norm,
}
each_class = pytest.mark.parametrize("cls", TORCHS, ids=lambda cls: cls.__name__)
add_class = pytest.mark.parametrize("cls", [AddLayerNorm, AddRMSNorm])

SHAPE = (3, 2, 5)
LAST = (2, 5)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def made(cls: type, *args: Any, **kwargs: Any) -> Any:
    """A module whose parameters are no longer ones and zeros."""
    module = cls(*(args or (LAST,)), device=DEVICE, **kwargs)
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=seed + 10))
    return module


def inputs(cls: type, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """x, and the residual that an Add module needs."""
    return (draw(*SHAPE, dtype=dtype), draw(*SHAPE, seed=1, dtype=dtype))[: 2 if cls.__name__.startswith("Add") else 1]


def outputs(module: nn.Module) -> tuple[Tensor, ...]:
    return as_tuple(module(*inputs(type(module), next(module.parameters()).dtype)))


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(outputs(one), outputs(other), strict=True))


# --- construction --------------------------------------------------------------------------------------------------


@each_class
def test_a_module_is_torchs(cls):
    module = cls(LAST)
    assert isinstance(module, TORCHS[cls]) and isinstance(module, nn.Module)
    torchs = TORCHS[cls](LAST)
    assert {n: (p.shape, p.dtype) for n, p in module.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in torchs.named_parameters()
    }
    for attribute in ("normalized_shape", "eps", "elementwise_affine"):
        assert getattr(module, attribute) == getattr(torchs, attribute)
    assert module.activation is None


@each_class
def test_the_constructor_takes_what_torchs_takes_by_place_and_by_name(cls):
    torchs = TORCHS[cls]
    values = {"normalized_shape": [2, 5], "eps": 0.5, "elementwise_affine": True, "bias": False}
    values |= {"device": torch.device("meta"), "dtype": torch.float64}
    values = {name: values[name] for name in list(inspect.signature(torchs).parameters)}
    by_place, by_name, expected = cls(*values.values()), cls(**values), torchs(**values)
    for module in (by_place, by_name):
        assert (module.normalized_shape, module.eps) == (expected.normalized_shape, expected.eps)
        assert {n: (p.shape, p.dtype, p.device) for n, p in module.named_parameters()} == {
            n: (p.shape, p.dtype, p.device) for n, p in expected.named_parameters()
        }
    assert cls(5, elementwise_affine=False).weight is None
    with pytest.raises(TypeError, match="unexpected keyword"):
        cls(5, swish=True)
    with pytest.raises(TypeError):
        cls(*values.values(), "gelu")  # the activation is a keyword, so that torch may add arguments


@each_class
def test_a_meta_module_becomes_real(cls, each_backend):
    module = cls(LAST, device="meta", activation="silu")
    assert all(parameter.is_meta for parameter in module.parameters())
    module = module.to_empty(device=DEVICE)
    module.reset_parameters()
    assert same(module, cls(LAST, activation="silu", device=DEVICE))


# --- forward -------------------------------------------------------------------------------------------------------


@each_class
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("elementwise_affine", [True, False])
def test_forward_is_the_functional_call(cls, activation, elementwise_affine, each_backend):
    module = made(cls, LAST, eps=0.25, elementwise_affine=elementwise_affine, activation=activation)
    x, residual = draw(*SHAPE), draw(*SHAPE, seed=1)
    keywords: dict[str, Any] = {"weight": module.weight, "eps": 0.25, "activation": activation}
    if isinstance(module, nn.LayerNorm):
        keywords["bias"] = module.bias
    expected = FUNCTIONS[cls](x, normalized_shape=LAST, residual=residual, **keywords)
    given = module(x, residual)
    assert isinstance(given, tuple) == isinstance(expected, tuple) == cls.__name__.startswith("Add")
    assert all(torch.equal(a, b) for a, b in zip(as_tuple(given), as_tuple(expected), strict=True))
    by_name = module(x=x, residual=residual)
    assert all(torch.equal(a, b) for a, b in zip(as_tuple(given), as_tuple(by_name), strict=True))


@pytest.mark.parametrize("cls", [LayerNorm, RMSNorm])
def test_the_residual_of_a_norm_may_be_left_out(cls, each_backend):
    module, (x,) = made(cls), inputs(cls)
    torchs = TORCHS[cls](LAST, device=DEVICE)
    torchs.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), torchs(x))
    assert torch.equal(module(x), module(x, None))


@add_class
def test_an_add_module_returns_y_and_total(cls, each_backend):
    module, (x, residual) = made(cls), inputs(cls)
    y, total = module(x, residual)
    torchs = TORCHS[cls](LAST, device=DEVICE)
    torchs.load_state_dict(module.state_dict())
    assert torch.equal(total, residual + x)
    torch.testing.assert_close(y, torchs(residual + x))
    with pytest.raises(TypeError, match="residual"):
        module(x)


@each_class
def test_parameters_learn_as_torchs_do(cls, each_backend):
    module = made(cls, activation="tanh")
    torchs = copy.deepcopy(module)
    torchs.__class__ = TORCHS[cls]

    def composed(x: Tensor, residual: Tensor | None = None) -> Tensor:
        total = x if residual is None else residual + x
        return torch.tanh(torchs(total)).sum() + (0 if residual is None else total.sum())

    for step in range(3):
        x = tuple(draw(*SHAPE, seed=step + seed) for seed in range(len(inputs(cls))))
        for parameters, loss in (
            (module.parameters(), sum(output.sum() for output in as_tuple(module(*x)))),
            (torchs.parameters(), composed(*x)),
        ):
            optimizer = torch.optim.SGD(list(parameters), lr=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(dict(module.named_parameters()), dict(torchs.named_parameters()))


@each_class
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_module_in_another_type_returns_that_type(cls, dtype, each_backend):
    module = made(cls, activation="relu").to(dtype)
    for output in outputs(module):
        assert output.dtype == dtype
    sum(output.sum() for output in outputs(module)).backward()
    assert all(parameter.grad.dtype == dtype for parameter in module.parameters())


@add_class
def test_a_half_module_carries_a_float32_stream(cls, each_backend):
    module = made(cls).bfloat16()
    x, residual = draw(*SHAPE, dtype=torch.bfloat16), draw(*SHAPE, seed=1)
    y, total = module(x, residual)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(total, residual + x)


@each_class
def test_training_changes_the_flag_alone(cls, each_backend):
    module = made(cls)
    assert module.training
    training = outputs(module)
    assert not module.eval().training
    assert all(torch.equal(a, b) for a, b in zip(training, outputs(module), strict=True))


def test_modules_stand_in_a_sequential(each_backend):
    stack = nn.Sequential(nn.Linear(5, 5), LayerNorm(5, activation="gelu"), nn.Linear(5, 5), RMSNorm(5)).to(DEVICE)
    torchs = nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 5), nn.RMSNorm(5)).to(DEVICE)
    renamed = zip(torchs.state_dict(), stack.state_dict().values(), strict=True)
    torchs.load_state_dict(dict(renamed))
    torch.testing.assert_close(stack(draw(4, 5)), torchs(draw(4, 5)))


# --- state ---------------------------------------------------------------------------------------------------------


WITHOUT_SOME = [(cls, {"elementwise_affine": False}) for cls in TORCHS]
WITHOUT_SOME += [(cls, {"bias": False}) for cls in TORCHS if TORCHS[cls] is nn.LayerNorm]


@pytest.mark.parametrize(("cls", "affine"), [*((cls, {}) for cls in TORCHS), *WITHOUT_SOME])
def test_the_state_is_torchs_both_ways(cls, affine):
    ours, torchs = made(cls, LAST, activation="elu", **affine), TORCHS[cls](LAST, device=DEVICE, **affine)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    torchs.load_state_dict(ours.state_dict(), strict=True)
    fresh = cls(LAST, device=DEVICE, **affine)
    fresh.load_state_dict(torchs.state_dict(), strict=True)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in fresh.state_dict().items())


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_class
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_equal_and_independent(cls, duplicate, each_backend):
    module = made(cls, LAST, activation=Activation("leaky_relu", negative_slope=0.2))
    twin = duplicate(module)
    assert type(twin) is cls and repr(twin) == repr(module) and same(module, twin)
    before = outputs(module)
    with torch.no_grad():
        twin.weight.add_(1)
    twin.activation = None
    assert not same(module, twin)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(module), strict=True))


@each_class
def test_the_repr_is_torchs_and_shows_an_activation_that_is_set(cls):
    torchs = repr(TORCHS[cls](LAST, eps=0.5)).removeprefix(TORCHS[cls].__name__)
    assert repr(cls(LAST, eps=0.5)) == cls.__name__ + torchs
    shown = repr(cls(LAST, eps=0.5, activation="gelu"))
    assert shown == f"{cls.__name__}{torchs[:-1]}, activation=Activation('gelu'))"
    assert "negative_slope=0.2" in repr(cls(LAST, activation=nn.LeakyReLU(0.2)))


def test_what_the_package_exports_is_here_or_beside():
    """The tests of each other norm's modules have the rest."""
    exported = {
        name for name, value in vars(fused_ops).items() if isinstance(value, type) and issubclass(value, nn.Module)
    }
    kinds = ("Instance", "Batch", "Switch")
    planes = ["GroupNorm", "SyncBatchNorm", *(f"{kind}Norm{dims}d" for kind in kinds for dims in (1, 2, 3))]
    beside = {*planes, *(f"Add{name}" for name in planes), *(f"WSConv{dims}d" for dims in (1, 2, 3)), "ResidualAdd"}
    assert exported == {cls.__name__ for cls in TORCHS} | beside


@pytest.mark.parametrize("name", [name for name in dir(fused_ops) if not name.startswith("_")])
def test_a_signature_names_what_the_constructor_takes(name):
    """As torch.nn.utils.skip_init asks of it."""
    cls = getattr(fused_ops, name)
    if isinstance(cls, type) and issubclass(cls, Extending):
        parameters = inspect.signature(cls).parameters
        assert "device" in parameters
        assert {each.kind for each in parameters.values()} <= {
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            inspect.Parameter.KEYWORD_ONLY,
        }


def test_parameters_can_be_left_uninitialized():
    norm = nn.utils.skip_init(LayerNorm, 8, activation="gelu")
    assert norm.activation == Activation("gelu")
