"""ResidualAdd, the module: its parameter and state, what it does in training and in evaluation, and its copies."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from fused_ops import Activation, ResidualAdd
from fused_ops import functional as F
from tests.norm_cases import DEVICE, normal

Tensor = torch.Tensor

SHAPE = (3, 6, 5)
DROPS = {"dropout_p": 0.3, "drop_path_p": 0.4}


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return normal(*SHAPE, dtype=dtype), normal(*SHAPE, dtype=dtype, seed=1)


def output(module: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return module(*inputs(dtype))


# --- construction --------------------------------------------------------------------------------------------------


def test_without_a_scale_there_is_no_parameter():
    module = ResidualAdd()
    assert list(module.parameters()) == [] and module.state_dict() == {} and module.scale is None
    assert (module.activation, module.dropout_p, module.drop_path_p, module.training) == (None, 0.0, 0.0, True)


@pytest.mark.parametrize(
    ("scale", "shape"),
    [
        ((5, 1e-5), (5,)),
        (((6, 1), 0.5), (6, 1)),
        (([6, 1], 0.5), (6, 1)),
        ((torch.Size((6, 1)), 0.5), (6, 1)),
        (((), 2), ()),
        ([5, 1], (5,)),
    ],
)
def test_a_scale_is_a_shape_and_an_initial_value(scale, shape):
    module = ResidualAdd(scale=scale, device=DEVICE)
    assert list(dict(module.named_parameters())) == ["scale"]
    assert isinstance(module.scale, nn.Parameter) and module.scale.shape == shape
    assert torch.equal(module.scale, torch.full(shape, float(scale[1]), device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_scale_has_the_type_and_the_device_that_are_asked_for(dtype):
    for device in (DEVICE, torch.device("meta")):
        module = ResidualAdd(scale=(5, 0.5), dtype=dtype, device=device)
        assert (module.scale.dtype, module.scale.device.type) == (dtype, device.type)


def test_a_meta_module_becomes_real(each_backend):
    module = ResidualAdd("silu", scale=(5, 0.25), device="meta")
    assert module.scale.is_meta
    module = module.to_empty(device=DEVICE)
    module.reset_parameters()
    assert torch.equal(output(module), output(ResidualAdd("silu", scale=(5, 0.25), device=DEVICE)))


def test_parameters_are_reset_to_the_initial_value():
    module = ResidualAdd(scale=(5, 0.25), device=DEVICE)
    with torch.no_grad():
        module.scale.add_(3)
    module.reset_parameters()
    assert (module.scale == 0.25).all() and module.scale.requires_grad
    ResidualAdd().reset_parameters()


@pytest.mark.parametrize("activation", ["gelu", nn.GELU(), Activation("gelu")], ids=repr)
def test_the_activation_is_the_first_argument_and_may_have_any_form(activation):
    assert ResidualAdd(activation).activation == Activation("gelu")
    assert ResidualAdd(activation=activation).activation == Activation("gelu")
    with pytest.raises(TypeError):
        ResidualAdd(activation, (5, 0.5))  # the rest are keywords


# --- forward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rates", [{}, DROPS], ids=["whole", "drops"])
@pytest.mark.parametrize("scale", [None, (5, 0.5), ((6, 1), 0.5)], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_forward_is_the_functional_call(activation, scale, rates, each_backend):
    module = ResidualAdd(activation, scale=scale, **rates, device=DEVICE)
    x, residual = inputs()
    torch.manual_seed(0)
    expected = F.residual_add(x, residual, activation=activation, scale=module.scale, **rates)
    assert torch.equal(output(module), expected)
    torch.manual_seed(0)
    assert torch.equal(module(x=x, residual=residual), expected)


def test_nothing_is_dropped_in_evaluation(each_backend):
    module = ResidualAdd("relu", scale=(5, 0.5), **DROPS, device=DEVICE)
    whole = ResidualAdd("relu", scale=(5, 0.5), device=DEVICE)
    x, residual = inputs()
    assert not torch.equal(output(module), output(whole))
    module.eval()
    before = torch.get_rng_state()
    assert torch.equal(module(x, residual), whole(x, residual))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(output(module.train()), output(whole))


def test_rates_are_read_when_it_is_called(each_backend):
    """As stochastic depth that grows in training changes them."""
    module = ResidualAdd()
    x, residual = inputs()
    module.drop_path_p = 1.0
    assert torch.equal(module(x, residual), residual)
    module.drop_path_p = 1.5
    with pytest.raises(ValueError, match=r"drop_path_p .* 1\.5"):
        module(x, residual)


def test_the_scale_learns_as_torchs_would(each_backend):
    module = ResidualAdd("tanh", scale=((6, 1), 0.5), device=DEVICE)
    scale = nn.Parameter(torch.full((6, 1), 0.5, device=DEVICE))
    for _ in range(3):
        x, residual = inputs()
        for parameter, y in ((module.scale, module(x, residual)), (scale, torch.tanh(residual + scale * x))):
            (gradient,) = torch.autograd.grad(y.square().sum(), parameter)
            with torch.no_grad():
                parameter.sub_(0.1 * gradient)
    torch.testing.assert_close(module.scale, scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_module_in_another_type(dtype, each_backend):
    module = ResidualAdd("relu", scale=(5, 0.5), **DROPS, device=DEVICE).to(dtype)
    y = output(module, dtype)
    assert y.dtype == module.scale.dtype == dtype
    y.sum().backward()
    assert module.scale.grad.dtype == dtype


def test_a_half_branch_joins_a_float32_stream(each_backend):
    module = ResidualAdd(scale=(5, 0.5), device=DEVICE).bfloat16()
    x, residual = normal(*SHAPE, dtype=torch.bfloat16), normal(*SHAPE, seed=1)
    y = module(x, residual)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, residual + 0.5 * x)


# --- state ---------------------------------------------------------------------------------------------------------


def test_the_state_goes_from_one_to_another():
    module = ResidualAdd(scale=(5, 0.25), device=DEVICE)
    with torch.no_grad():
        module.scale.copy_(normal(5))
    other = ResidualAdd(scale=(5, 1.0), device=DEVICE)
    assert list(module.state_dict()) == ["scale"]
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(other.scale, module.scale)
    with pytest.raises(RuntimeError, match="scale"):
        ResidualAdd().load_state_dict(module.state_dict())


def saved_and_loaded(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_equal_and_independent(duplicate, each_backend):
    module = ResidualAdd(Activation("leaky_relu", negative_slope=0.2), scale=(5, 0.5), **DROPS, device=DEVICE)
    twin = duplicate(module)
    before = output(module)
    assert type(twin) is ResidualAdd and repr(twin) == repr(module) and torch.equal(output(twin), before)
    with torch.no_grad():
        twin.scale.add_(1)
    twin.activation = None
    assert not torch.equal(output(twin), before) and torch.equal(output(module), before)
    twin.reset_parameters()
    assert torch.equal(twin.scale, module.scale)


def test_the_repr_shows_what_is_set():
    assert repr(ResidualAdd()) == "ResidualAdd()"
    assert repr(ResidualAdd("gelu")) == "ResidualAdd(activation=Activation('gelu'))"
    shown = repr(ResidualAdd(nn.LeakyReLU(0.2), scale=((6, 1, 1), 1e-6), dropout_p=0.1, drop_path_p=0.2))
    assert shown == (
        "ResidualAdd(activation=Activation('leaky_relu', negative_slope=0.2), scale=((6, 1, 1), 1e-06), "
        "dropout_p=0.1, drop_path_p=0.2)"
    )
    assert repr(ResidualAdd(drop_path_p=0.2)) == "ResidualAdd(drop_path_p=0.2)"
    assert repr(ResidualAdd(scale=(8, 1e-5))) == "ResidualAdd(scale=((8,), 1e-05))"
