"""Weight Standardization: the function, a layer norm of filters, and the convolutions that standardize with it."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrizations

import fused_ops
from fused_ops import functional as F
from tests.calls import scalar
from tests.norm_cases import DEVICE, normal

Tensor = torch.Tensor

# torch's own, as it first loads forward-mode differentiation.
pytestmark = [pytest.mark.one_in(8), pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")]

NAMES = ("WSConv1d", "WSConv2d", "WSConv3d")
each_name = pytest.mark.parametrize("name", NAMES)
SHAPES = [(4, 3), (4, 3, 5), (6, 3, 3, 3), (5, 7, 1, 1), (2, 3, 2, 3, 2), (1, 9)]


def formula(weight: Tensor, eps: float = 1e-5) -> Tensor:
    dims = tuple(range(1, weight.dim()))
    deviation = weight - weight.mean(dims, keepdim=True)
    return deviation * torch.rsqrt(deviation.square().mean(dims, keepdim=True) + eps)


def channels_last(weight: Tensor) -> Tensor:
    return weight.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS = {
    "contiguous": lambda weight: weight,
    "channels_last": channels_last,
    "strided": lambda weight: torch.stack([weight, weight], -1)[..., 0],
    "filters": lambda weight: torch.cat([weight, weight])[::2],
    "transposed": lambda weight: weight.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda weight: weight[..., :1].expand_as(weight),
    "unaligned": lambda weight: torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(weight.shape),
}


# --- the function --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_formula_with_its_gradients_in_every_layout(shape, layout, each_backend):
    weight = LAYOUTS[layout](normal(*shape, dtype=torch.float64)).detach().requires_grad_()
    ours, expected = F.weight_standardize(weight, 1e-3), formula(weight, 1e-3)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(*(torch.autograd.grad(scalar((y,)), weight) for y in (ours, expected)))


@pytest.mark.parametrize("order", [*itertools.permutations(range(1, 4))], ids=str)
def test_filters_may_lie_in_any_order(order, each_backend):
    """Those of sizes that differ; an order that is its own inverse among them."""
    size = [2, 3, 4, 5]
    moved = normal(*(size[dim] for dim in (0, *order)))
    weight = moved.permute(0, *(1 + order.index(dim) for dim in range(1, 4)))
    assert weight.shape == (2, 3, 4, 5)
    standardized = F.weight_standardize(weight)
    assert standardized.stride() == weight.stride()
    torch.testing.assert_close(standardized, formula(weight, 1e-5))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 2])
def test_the_layout_in_is_the_layout_out_without_a_copy(shape, each_backend):
    for weight in (normal(*shape), channels_last(normal(*shape))):
        weight = weight.requires_grad_()
        standardized = F.weight_standardize(weight)
        (gradient,) = torch.autograd.grad(standardized.sum(), weight)
        for found in (standardized, gradient):
            assert found.shape == weight.shape
            assert [s for s, n in zip(found.stride(), shape, strict=True) if n > 1] == [
                s for s, n in zip(weight.stride(), shape, strict=True) if n > 1
            ]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_filters_are_one_launch_each_way(layout, triton_backend, launches):
    weight = LAYOUTS[layout](normal(6, 3, 3, 3)).requires_grad_()
    standardized = F.weight_standardize(weight)
    assert len(launches) == 1
    standardized.backward(normal(6, 3, 3, 3, seed=1))
    assert len(launches) == 2


def test_every_filter_has_mean_0_and_variance_1(each_backend):
    standardized = F.weight_standardize(1000 + 5 * normal(8, 4, 3, 3, dtype=torch.float64), 1e-12).flatten(1)
    torch.testing.assert_close(standardized.mean(1), standardized.new_zeros(8), atol=1e-9, rtol=0)
    torch.testing.assert_close(standardized.var(1, correction=0), standardized.new_ones(8), atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_type_in_is_the_type_out(dtype, each_backend):
    weight = normal(4, 3, 3, dtype=dtype).requires_grad_()
    standardized = F.weight_standardize(weight)
    assert standardized.dtype == dtype
    (gradient,) = torch.autograd.grad(standardized.sum(), weight)
    assert gradient.dtype == dtype


def test_derivatives_are_those_of_finite_differences(each_backend):
    for weight in (normal(2, 3, 2, dtype=torch.float64), channels_last(normal(2, 2, 2, 2, dtype=torch.float64))):
        weight = weight.requires_grad_()
        assert gradcheck(F.weight_standardize, (weight,), fast_mode=True, check_batched_grad=True)
        assert gradgradcheck(F.weight_standardize, (weight,), fast_mode=True)


def test_vmap_over_models_is_an_ensemble(each_backend):
    members = normal(3, 4, 2, 3, dtype=torch.float64)
    for batch in (members, channels_last(members)):
        torch.testing.assert_close(torch.vmap(F.weight_standardize)(batch), torch.stack([*map(formula, batch)]))


@pytest.mark.parametrize("shape", [(0, 3, 3), (4, 0, 3), (4, 3, 0, 0)])
def test_empty_weights(shape, each_backend):
    weight = normal(*shape).requires_grad_()
    standardized = F.weight_standardize(weight)
    (gradient,) = torch.autograd.grad(standardized.sum(), weight)
    assert standardized.shape == gradient.shape == weight.shape


def test_what_is_no_weight_is_refused(each_backend):
    for shape, received in (((), r"\(\)"), ((4,), r"\(4,\)")):
        with pytest.raises(ValueError, match=rf"weight_standardize: weight must have shape .* has shape {received}"):
            F.weight_standardize(torch.ones(shape))
    with pytest.raises(NotImplementedError, match=r"weight_standardize: weight must have one of.*torch\.int64"):
        F.weight_standardize(torch.ones(4, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"weight_standardize: weight must be a torch\.Tensor, but is list"):
        F.weight_standardize([[1.0]])
    assert list(inspect.signature(F.weight_standardize).parameters) == ["weight", "eps"]


# --- the convolutions ----------------------------------------------------------------------------------------------


def dims_of(name: str) -> int:
    return int(name[-2])


def torchs_class(name: str) -> type[nn.Module]:
    return getattr(nn, name.removeprefix("WS"))


def made(name: str, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    kwargs = {"device": DEVICE, "dtype": torch.float64} | kwargs
    return getattr(fused_ops, name)(*(args or (4, 6, 3)), **kwargs)


def input_of(name: str, batch: tuple[int, ...] = (2,), dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(*batch, 4, *(6, 5, 7)[: dims_of(name)], dtype=dtype)


def composed(conv: nn.Module, eps: float = 1e-5) -> nn.Module:
    """torch's convolution with the standardized weight."""
    torchs = torchs_class(type(conv).__name__)
    plain = copy.deepcopy(conv)
    plain.__class__ = torchs
    with torch.no_grad():
        plain.weight.copy_(formula(conv.weight, eps))
    return plain


FORMS = [
    {},
    {"bias": False},
    {"stride": 2, "padding": 1, "dilation": 2},
    {"groups": 2},
    {"padding": "same"},
    {"padding": "valid"},
    {"padding": "same", "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": 2, "padding_mode": "replicate"},
    {"padding": 1, "padding_mode": "zeros"},
]


@each_name
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_convolution_is_torchs_with_standardized_weights(name, form, each_backend):
    conv = made(name, **form)
    assert isinstance(conv, torchs_class(name)) and isinstance(conv, nn.Module)
    for batch in ((2,), ()):
        x = input_of(name, batch)
        torch.testing.assert_close(conv(x), composed(conv)(x))
        torch.testing.assert_close(conv(input=x), composed(conv)(x))


@each_name
def test_eps_is_a_keyword_of_the_constructor(name, each_backend):
    conv, x = made(name, eps=0.5), input_of(name)
    assert conv.eps == 0.5 and made(name).eps == 1e-5
    torch.testing.assert_close(conv(x), composed(conv, 0.5)(x))
    conv.eps = 0.25
    torch.testing.assert_close(conv(x), composed(conv, 0.25)(x))
    with pytest.raises(TypeError, match="unexpected keyword"):
        made(name, epsilon=0.5)


@each_name
def test_the_constructor_takes_what_torchs_takes_by_place(name):
    arguments = (4, 6, 3, 2, 1, 1, 2, False, "reflect", torch.device("meta"), torch.float64)
    ours, torchs = getattr(fused_ops, name)(*arguments), torchs_class(name)(*arguments)
    assert repr(ours) == "WS" + repr(torchs)
    assert (ours.weight.shape, ours.weight.dtype, ours.weight.device) == (
        torchs.weight.shape,
        torchs.weight.dtype,
        torchs.weight.device,
    )


@each_name
def test_the_repr_shows_an_eps_that_is_not_the_default(name):
    assert repr(made(name)) == "WS" + repr(torchs_class(name)(4, 6, 3))
    assert repr(made(name, eps=1e-3)) == "WS" + repr(torchs_class(name)(4, 6, 3))[:-1] + ", eps=0.001)"


@each_name
@pytest.mark.parametrize("bias", [True, False])
def test_the_state_is_torchs_both_ways(name, bias):
    ours, torchs = made(name, bias=bias), torchs_class(name)(4, 6, 3, bias=bias).to(DEVICE, torch.float64)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    torchs.load_state_dict(ours.state_dict(), strict=True)
    fresh = made(name, bias=bias)
    fresh.load_state_dict(torchs.state_dict(), strict=True)
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in fresh.state_dict().items())


@each_name
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda conv: pickle.loads(pickle.dumps(conv))])
def test_a_copy_is_equal_and_independent(name, duplicate, each_backend):
    conv, x = made(name, eps=0.5), input_of(name)
    twin, before = duplicate(conv), conv(x)
    assert type(twin) is type(conv) and repr(twin) == repr(conv) and torch.equal(twin(x), before)
    with torch.no_grad():
        twin.weight[:, 0] += 1
    assert not torch.equal(twin(x), before) and torch.equal(conv(x), before)


@each_name
def test_it_learns_as_the_formula_does_and_caches_nothing(name, each_backend):
    conv = made(name)
    keys = set(vars(conv))
    twin, x = copy.deepcopy(conv), input_of(name)
    function = getattr(nn.functional, f"conv{dims_of(name)}d")
    for _ in range(3):
        for module, y in ((conv, conv(x)), (twin, function(x, formula(twin.weight), twin.bias))):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            optimizer.zero_grad()
            scalar((y,)).backward()
            optimizer.step()
        torch.testing.assert_close(dict(conv.named_parameters()), dict(twin.named_parameters()))
    assert set(vars(conv)) == keys and len(conv.state_dict()) == 2
    with torch.no_grad():
        conv.weight.mul_(3).add_(1)  # which a standardized weight does not show
    torch.testing.assert_close(conv(x), composed(twin)(x), rtol=1e-4, atol=1e-4)


def test_a_channels_last_network_stays_so(each_backend):
    conv = made("WSConv2d", dtype=torch.float32).to(memory_format=torch.channels_last)
    x = input_of("WSConv2d", dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    y = conv(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, composed(conv)(x))
    y.sum().backward()
    assert conv.weight.grad.is_contiguous(memory_format=torch.channels_last)


def test_a_weight_may_be_parametrized(each_backend):
    conv, x = made("WSConv1d"), input_of("WSConv1d")
    parametrizations.weight_norm(conv)
    function = nn.functional.conv1d
    torch.testing.assert_close(conv(x), function(x, formula(conv.weight), conv.bias))


@each_name
def test_a_compiled_convolution_is_one_graph(name, each_backend):
    torch._dynamo.reset()
    conv, x = made(name, padding="same", padding_mode="circular"), input_of(name)
    twin = copy.deepcopy(conv)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for step in range(2):
        torch.testing.assert_close(compiled(x), conv(x))
        for run, module in ((conv, conv), (compiled, twin)):
            module.zero_grad()
            scalar((run(x),)).backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= 0.1 * parameter.grad
        torch.testing.assert_close(dict(twin.named_parameters()), dict(conv.named_parameters()), msg=f"step {step}")
    torch._dynamo.reset()


def test_a_convolution_in_half_returns_half(each_backend):
    conv = made("WSConv2d").bfloat16()
    y = conv(input_of("WSConv2d", dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert conv.weight.grad.dtype == torch.bfloat16
