"""GroupNorm and InstanceNorm as modules: torch.nn's own constructors, parameters, state and checks of the input."""

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
from fused_ops import Activation
from fused_ops import functional as F
from tests.calls import as_tuple, scalar
from tests.channel_norm_calls import (
    CHANNELS,
    INSTANCE,
    NAMES,
    PLAIN,
    inputs,
    made,
    made_by_torch,
    sizes,
    spatial,
    torchs_class,
)
from tests.norm_cases import DEVICE, normal

pytestmark = pytest.mark.one_in(8)

Tensor = torch.Tensor

each_name = pytest.mark.parametrize("name", NAMES)
each_plain = pytest.mark.parametrize("name", PLAIN)
each_instance = pytest.mark.parametrize("name", INSTANCE)
each_added = pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("Add")])


def outputs(module: nn.Module, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return as_tuple(module(*inputs(type(module).__name__, dtype=dtype)))


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(outputs(one), outputs(other), strict=True))


def described(module: nn.Module) -> dict[str, Any]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in tensors.items()}


# --- construction --------------------------------------------------------------------------------------------------


@each_name
def test_a_module_is_torchs(name):
    module, torchs = getattr(fused_ops, name)(*sizes(name)), torchs_class(name)(*sizes(name))
    assert isinstance(module, torchs_class(name))
    assert described(module) == described(torchs)
    assert {key: value for key, value in vars(module).items() if key in vars(torchs) and key[0] != "_"} == {
        key: value for key, value in vars(torchs).items() if key[0] != "_"
    }
    assert module.activation is None


@each_name
def test_the_constructor_takes_what_torchs_takes_by_place_and_by_name(name):
    cls, torchs = getattr(fused_ops, name), torchs_class(name)
    values = {"num_groups": 2, "num_channels": 4, "num_features": 4, "eps": 0.5, "momentum": 0.25, "affine": True}
    values |= {"track_running_stats": True, "device": torch.device("meta"), "dtype": torch.float64}
    signature = inspect.signature(torchs).parameters
    by_place = [values[p.name] for p in signature.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = {key: values[key] for key in signature if key in values}
    if "bias" in signature:
        keywords["bias"] = False
    for ours, theirs in ((cls(*by_place), torchs(*by_place)), (cls(**keywords), torchs(**keywords))):
        assert described(ours) == described(theirs)
        assert ours.eps == 0.5 and getattr(ours, "momentum", 0.25) == 0.25
    with pytest.raises(TypeError, match="unexpected keyword"):
        cls(*sizes(name), swish=True)
    with pytest.raises(TypeError):
        cls(*by_place, "gelu")  # the activation is a keyword, so that torch may add arguments


@each_name
def test_a_meta_module_becomes_real(name, each_backend):
    module = getattr(fused_ops, name)(*sizes(name), device="meta", dtype=torch.float64, activation="silu")
    assert all(parameter.is_meta for parameter in module.parameters())
    module = module.to_empty(device=DEVICE)
    module.reset_parameters()
    assert same(module, getattr(fused_ops, name)(*sizes(name), activation="silu", device=DEVICE, dtype=torch.float64))


@pytest.mark.parametrize("name", ["GroupNorm", "AddGroupNorm"])
@pytest.mark.parametrize("groups", [0, -2])
def test_fewer_groups_than_one_are_refused_when_the_module_is_made(name, groups):
    """torch divides by the one, and keeps the other until it is called."""
    with pytest.raises(ValueError, match=rf"{name}: num_groups must be at least 1, but is {groups}"):
        getattr(fused_ops, name)(groups, 4)
    with pytest.raises(ValueError, match=r"num_channels \(4\) must be divisible by num_groups \(3\)"):
        getattr(fused_ops, name)(num_groups=3, num_channels=4)


# --- forward -------------------------------------------------------------------------------------------------------


@each_name
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("affine", [True, False])
def test_forward_is_the_functional_call(name, activation, affine, each_backend):
    module = made(name, affine=affine, eps=0.25, activation=activation)
    function = getattr(
        F, ("add_" if name.startswith("Add") else "") + ("group" if "Group" in name else "instance") + "_norm"
    )
    groups = {"num_groups": 3} if "Group" in name else {}
    x, residual = (normal(2, CHANNELS, *spatial(name), dtype=torch.float64, seed=seed) for seed in range(2))
    keywords = {"weight": module.weight, "bias": module.bias, "eps": 0.25, "activation": activation}
    expected = function(x, residual=residual, **groups, **keywords)
    given = module(x, residual)
    assert isinstance(given, tuple) == isinstance(expected, tuple) == name.startswith("Add")
    for call in (given, module(x=x, residual=residual)):
        assert all(torch.equal(a, b) for a, b in zip(as_tuple(call), as_tuple(expected), strict=True))


@each_plain
@pytest.mark.parametrize("affine", [True, False])
def test_without_a_residual_it_is_torchs(name, affine, each_backend):
    module, torchs, (x,) = made(name, affine=affine), made_by_torch(name, affine=affine), inputs(name)
    torch.testing.assert_close(module(x), torchs(x))
    assert torch.equal(module(x), module(x, None))


@each_added
def test_an_add_module_returns_y_and_total(name, each_backend):
    module, torchs, (x, residual) = made(name), made_by_torch(name), inputs(name)
    y, total = module(x, residual)
    assert torch.equal(total, residual + x)
    torch.testing.assert_close(y, torchs(residual + x))
    with pytest.raises(TypeError, match="residual"):
        module(x)


@each_name
def test_parameters_learn_as_torchs_do(name, each_backend):
    module, torchs = made(name, activation="tanh"), made_by_torch(name)

    def composed(x: Tensor, residual: Tensor | None = None) -> Tensor:
        total = x if residual is None else residual + x
        return torch.tanh(torchs(total)).sum() + (0 if residual is None else total.sum())

    for step in range(3):
        x = inputs(name, seed=7 * step)
        for parameters, loss in (
            (module.parameters(), sum(output.sum() for output in as_tuple(module(*x)))),
            (torchs.parameters(), composed(*x)),
        ):
            optimizer = torch.optim.SGD(list(parameters), lr=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(dict(module.named_parameters()), dict(torchs.named_parameters()))


@each_name
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_module_in_another_type_returns_that_type(name, dtype, each_backend):
    module = made(name, activation="relu").to(dtype)
    for output in outputs(module, dtype):
        assert output.dtype == dtype
    sum(output.sum() for output in outputs(module, dtype)).backward()
    assert all(parameter.grad.dtype == dtype for parameter in module.parameters())


@each_added
def test_a_half_module_carries_a_float32_stream(name, each_backend):
    module = made(name).bfloat16()
    x, residual = inputs(name)
    x, residual = x.bfloat16(), residual.float()
    y, total = module(x, residual)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(total, residual + x)


def test_modules_stand_in_a_sequential(each_backend):
    def stack(norms: Any, *activation: nn.Module, **keywords: Any) -> nn.Module:
        layers = (nn.Conv2d(3, 6, 3), norms.GroupNorm(2, 6, **keywords), *activation, nn.Conv2d(6, 6, 3))
        return nn.Sequential(*layers, norms.InstanceNorm2d(6, affine=True)).to(DEVICE, torch.float64)

    ours, torchs = stack(fused_ops, activation="silu"), stack(nn, nn.SiLU())
    torchs.load_state_dict(dict(zip(torchs.state_dict(), ours.state_dict().values(), strict=True)))
    x = normal(2, 3, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(ours(x), torchs(x))


# --- state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        *((name, {"affine": affine}) for name in NAMES for affine in (True, False)),
        *((name, {"bias": False}) for name in NAMES),
        *((name, {"track_running_stats": True}) for name in INSTANCE),
    ],
)
def test_the_state_is_torchs_both_ways(name, keywords):
    if "bias" in keywords and "bias" not in inspect.signature(torchs_class(name)).parameters:
        pytest.skip("this torch's constructor has no bias")
    ours, torchs = made(name, activation="elu", **keywords), made_by_torch(name, **keywords)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    torchs.load_state_dict(ours.state_dict(), strict=True)
    fresh = getattr(fused_ops, name)(*sizes(name), **{"affine": True} | keywords).to(DEVICE, torch.float64)
    fresh.load_state_dict(torchs.state_dict(), strict=True)
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in fresh.state_dict().items())


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_name
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_equal_and_independent(name, duplicate, each_backend):
    module = made(name, activation=Activation("leaky_relu", negative_slope=0.2))
    twin = duplicate(module)
    assert type(twin) is type(module) and repr(twin) == repr(module) and same(module, twin)
    before = outputs(module)
    with torch.no_grad():
        twin.weight.add_(1)
    twin.activation = None
    assert not same(module, twin)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(module), strict=True))


@each_name
def test_the_repr_is_torchs_and_shows_an_activation_that_is_set(name):
    cls, torchs = getattr(fused_ops, name), torchs_class(name)
    shown = repr(torchs(*sizes(name), eps=0.5)).removeprefix(torchs.__name__)
    assert repr(cls(*sizes(name), eps=0.5)) == name + shown
    assert repr(cls(*sizes(name), eps=0.5, activation="gelu")) == f"{name}{shown[:-1]}, activation=Activation('gelu'))"
    assert "negative_slope=0.2" in repr(cls(*sizes(name), activation=nn.LeakyReLU(0.2)))


# --- torch.compile -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", ["GroupNorm", "AddGroupNorm", "InstanceNorm2d", "AddInstanceNorm1d"])
def test_a_compiled_module_trains_as_the_module(name, each_backend):
    torch._dynamo.reset()
    keywords = {"track_running_stats": True} if "Instance" in name else {}
    module = made(name, activation="gelu", **keywords)
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        results = []
        for run in (module, compiled):
            tensors = tuple(tensor.requires_grad_() for tensor in inputs(name, seed=10 * seed))
            found = as_tuple(run(*tensors))
            wanted = (*tensors, *(module if run is module else twin).parameters())
            results.append((found, torch.autograd.grad(scalar(found), wanted)))
        torch.testing.assert_close(*results)
    torch.testing.assert_close(dict(twin.named_buffers()), dict(module.named_buffers()))
    torch._dynamo.reset()
