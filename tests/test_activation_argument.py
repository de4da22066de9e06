"""`activation=`: a name, a torch.nn module or an `Activation` say the same thing, and an `Activation` is a value."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import fused_ops
from fused_ops import Activation
from fused_ops import functional as F
from fused_ops.activation import KNOWN, resolve
from tests.norm_cases import DEVICE, TORCH_ACTIVATIONS

# Every torch.nn module that is one of ours, with and without its parameters, and what it is.
MODULES = [
    (nn.ReLU(), Activation("relu")),
    (nn.ReLU(inplace=True), Activation("relu")),
    (nn.ReLU6(), Activation("relu6")),
    (nn.LeakyReLU(), Activation("leaky_relu")),
    (nn.LeakyReLU(0.25), Activation("leaky_relu", negative_slope=0.25)),
    (nn.LeakyReLU(-0.5), Activation("leaky_relu", negative_slope=-0.5)),
    (nn.ELU(), Activation("elu")),
    (nn.ELU(alpha=2), Activation("elu", alpha=2.0)),
    (nn.SELU(), Activation("selu")),
    (nn.GELU(), Activation("gelu")),
    (nn.GELU(approximate="tanh"), Activation("gelu_tanh")),
    (nn.SiLU(), Activation("silu")),
    (nn.Sigmoid(), Activation("sigmoid")),
    (nn.Tanh(), Activation("tanh")),
    (nn.Mish(), Activation("mish")),
    (nn.Hardswish(), Activation("hardswish")),
    (nn.Hardsigmoid(), Activation("hardsigmoid")),
    (nn.Softplus(), Activation("softplus")),
    (nn.Softplus(beta=3, threshold=0.5), Activation("softplus", beta=3.0, threshold=0.5)),
]
each_module = pytest.mark.parametrize(("module", "meant"), MODULES, ids=[str(module) for module, _ in MODULES])

VALUES = [
    *(Activation(name) for name in KNOWN),
    Activation("leaky_relu", negative_slope=0.1 + 0.2),  # whose shortest decimal has 17 digits
    Activation("softplus", threshold=1e-7),
]
each_value = pytest.mark.parametrize("value", VALUES, ids=str)


@each_module
def test_a_module_is_understood_with_its_parameters(module, meant):
    assert resolve(module) == meant


def test_every_name_has_a_module_and_every_known_name_is_tested():
    assert {meant.name for _, meant in MODULES} == set(KNOWN) == set(TORCH_ACTIVATIONS)


@each_module
def test_a_module_gives_what_it_would_give_after_the_norm(module, meant, each_backend):
    x = torch.linspace(-8, 8, 24, device=DEVICE).view(2, 12).requires_grad_()
    weight = torch.full((12,), 5.0, device=DEVICE)
    expected = copy.deepcopy(module)(nn.functional.layer_norm(x, (12,), weight))
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    for activation in (module, meant):
        y = F.layer_norm(x, (12,), weight, activation=activation)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected_gradient)


@pytest.mark.parametrize("name", KNOWN)
def test_a_name_is_the_activation_with_torchs_defaults(name):
    assert resolve(name) == Activation(name)
    assert dict(Activation(name).parameters) == dict(KNOWN[name])


def test_none_is_no_activation_and_an_activation_is_itself():
    value = Activation("elu", alpha=0.5)
    assert resolve(None) is None
    assert resolve(value) is value


# --- an Activation is a value --------------------------------------------------------------------------------------


@each_value
def test_equal_values_are_equal_and_hash_alike(value):
    twin = Activation(value.name, **value.parameters)
    assert twin == value and hash(twin) == hash(value)
    assert not (twin != value)  # noqa: SIM202  (a class may define one without the other)
    assert {value: 1}[twin] == 1
    assert value != value.name and value is not None
    assert [other for other in VALUES if other == value] == [value]


def test_a_parameter_is_a_float_however_it_was_given():
    assert Activation("elu", alpha=2) == Activation("elu", alpha=2.0)
    assert type(Activation("elu", alpha=2).parameters["alpha"]) is float


@each_value
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_value_survives_copies(value, duplicate):
    assert duplicate(value) == value


@each_value
def test_the_repr_makes_the_value_again(value):
    assert eval(repr(value)) == value


@each_value
def test_a_value_cannot_be_changed(value):
    before = repr(value)
    for name in ("name", "parameters", "other"):
        with pytest.raises(AttributeError, match="immutable"):
            setattr(value, name, "relu")
        with pytest.raises(AttributeError, match="immutable"):
            delattr(value, name)
    with pytest.raises(TypeError):
        value.parameters["alpha"] = 3.0
    assert repr(value) == before


@each_value
def test_kernels_take_the_parameters_as_two_numbers_and_give_them_back(value):
    alpha, beta = value.scalars
    assert [alpha, beta] == [*value.parameters.values(), 0.0, 0.0][:2]
    assert Activation.from_scalars(value.name, alpha, beta) == value


@pytest.mark.parametrize(
    ("name", "parameters", "received"),
    [
        ("swish", {}, "'swish'"),
        ("relu", {"alpha": 1.0}, "'alpha'"),
        ("elu", {"beta": 1.0}, "'beta'"),
        ("gelu", {"approximate": "tanh"}, "'approximate'"),
        ("leaky_relu", {"negative_slope": "steep"}, "steep"),
    ],
)
def test_an_unknown_name_or_parameter_is_refused(name, parameters, received):
    with pytest.raises(ValueError, match=received):
        Activation(name, **parameters)


def test_a_refusal_names_what_there_is():
    with pytest.raises(ValueError, match="its parameters: beta, threshold"):
        Activation("softplus", alpha=1.0)
    with pytest.raises(ValueError) as caught:
        Activation("swish")
    assert all(name in str(caught.value) for name in KNOWN)


def test_a_module_given_to_a_layer_is_not_a_submodule():
    layer = fused_ops.LayerNorm(4, activation=nn.LeakyReLU(0.25))
    assert layer.activation == Activation("leaky_relu", negative_slope=0.25)
    assert list(layer.children()) == [] and set(layer.state_dict()) == {"weight", "bias"}
