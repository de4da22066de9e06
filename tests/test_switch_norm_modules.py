"""SwitchNorm as modules: construction, state, running statistics over several steps, and checks."""

from __future__ import annotations

import copy
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
from tests.norm_cases import DEVICE, normal

pytestmark = pytest.mark.one_in(8)

Tensor = torch.Tensor

CHANNELS = 5
PLAIN = tuple(f"SwitchNorm{dims}d" for dims in (1, 2, 3))
ADDED = tuple(f"Add{name}" for name in PLAIN)
PARAMETERS = ("weight", "bias", "mean_weight", "var_weight")
BUFFERS = ("running_mean", "running_var")
each_name = pytest.mark.parametrize("name", PLAIN + ADDED)


def inputs(name: str, batch: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    """x, and the residual that an Add module needs."""
    shape = (batch, CHANNELS, *(4, 3, 2)[: int(name[-2])])
    return tuple(normal(*shape, dtype=dtype, seed=seed + i) for i in range(1 + name.startswith("Add")))


def made(name: str, **kwargs: Any) -> Any:
    """A module whose parameters are no longer ones and zeros."""
    module = getattr(fused_ops, name)(CHANNELS, **{"device": DEVICE, "dtype": torch.float64} | kwargs)
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(*parameter.shape, dtype=torch.float64, seed=seed + 10))
    return module


def torchs_batch_norm(name: str, **kwargs: Any) -> nn.Module:
    return getattr(nn, f"BatchNorm{name[-2:]}")(CHANNELS, device=DEVICE, dtype=torch.float64, **kwargs)


def normalized(tensors: tuple[Tensor, ...]) -> Tensor:
    return sum(tensors[1:], tensors[0])


# --- calls ---------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(3)
@each_name
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_forward_is_the_functional_call(name, activation, training, each_backend):
    module = made(name, eps=0.25, activation=activation).train(training)
    function = F.add_switch_norm if name.startswith("Add") else F.switch_norm
    x, residual = inputs("Add" + name.removeprefix("Add"))
    running = [buffer.clone() for buffer in module.buffers()]
    own = {key: getattr(module, key) for key in PARAMETERS}
    keywords = {"running_mean": running[0], "running_var": running[1], "training": training, "eps": 0.25, **own}
    expected = function(x, residual=residual, activation=activation, **keywords)
    given = module(x=x, residual=residual)
    assert isinstance(given, tuple) == isinstance(expected, tuple) == name.startswith("Add")
    assert all(torch.equal(a, b) for a, b in zip(as_tuple(given), as_tuple(expected), strict=True))
    assert all(map(torch.equal, module.buffers(), running))


@pytest.mark.one_in(3)
@each_name
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_running_statistics_are_torchs_batch_norms(name, momentum, each_backend):
    """A momentum of None is a cumulative average, whose count is a buffer as torch's."""
    module, torchs = made(name, momentum=momentum), torchs_batch_norm(name, momentum=momentum)
    for seed in range(3):
        tensors = inputs(name, 2 + seed, seed=10 * seed)
        module(*tensors), torchs(normalized(tensors))
    module.eval(), torchs.eval()
    module(*inputs(name, 1)), torchs(normalized(inputs(name, 1)))
    for key, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, getattr(torchs, key))
    assert len(list(module.buffers())) == (3 if momentum is None else 2)


def test_a_momentum_taken_away_later_is_refused():
    """Nothing has been counted for a cumulative average."""
    module = made("SwitchNorm1d")
    module.momentum = None
    with pytest.raises(TypeError, match="momentum must be a number, but is None"):
        module(*inputs("SwitchNorm1d"))
    assert module.eval()(*inputs("SwitchNorm1d")).isfinite().all()


@pytest.mark.parametrize("name", ["SwitchNorm1d", "AddSwitchNorm1d"])
@pytest.mark.parametrize("training", [True, False])
def test_rows_mix_layer_and_batch_by_the_last_two_entries(name, training, each_backend):
    module = made(name).train(training)
    tensors = [tensor[..., 0] for tensor in inputs(name, 4)]
    x = normalized(tensors)
    shares = [parameter[1:].softmax(0) for parameter in (module.mean_weight, module.var_weight)]
    means, variances = [x.mean(1, keepdim=True)], [x.var(1, correction=0, keepdim=True)]
    means.append(x.mean(0) if training else module.running_mean.clone())
    variances.append(x.var(0, correction=0) if training else module.running_var.clone())
    kinds = zip(shares, (means, variances), strict=True)
    mean, var = (share[0] * layer + share[1] * batch for share, (layer, batch) in kinds)
    expected = (x - mean) / (var + module.eps).sqrt() * module.weight + module.bias
    y, *total = as_tuple(module(*tensors))
    torch.testing.assert_close(y, expected)
    assert all(torch.equal(t, x) for t in total)
    scalar((y,)).backward()
    assert module.mean_weight.grad[0] == module.var_weight.grad[0] == 0
    assert module.mean_weight.grad[1:].all() and module.var_weight.grad[1:].all()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_initial_shares_are_equal(dims):
    x = inputs(f"SwitchNorm{dims}d")[0]
    module = getattr(fused_ops, f"SwitchNorm{dims}d")(CHANNELS).to(DEVICE, torch.float64)
    spans = [tuple(range(2, x.dim())), tuple(range(1, x.dim())), (0, *range(2, x.dim()))]
    mean = sum(x.mean(span, keepdim=True) for span in spans) / 3
    var = sum(x.var(span, correction=0, keepdim=True) for span in spans) / 3
    torch.testing.assert_close(module(x), (x - mean) / (var + 1e-5).sqrt())


@each_name
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_module_in_another_type_returns_that_type(name, dtype, each_backend):
    module = made(name, activation="relu").to(dtype)
    outputs = as_tuple(module(*inputs(name, dtype=dtype)))
    assert {output.dtype for output in outputs} == {dtype} == {buffer.dtype for buffer in module.buffers()}
    scalar(outputs).backward()
    assert all(parameter.grad.dtype == dtype for parameter in module.parameters())


@each_name
def test_half_input_moves_float32_statistics(name, each_backend):
    module, torchs = made(name).float(), torchs_batch_norm(name)
    tensors = [(tensor * 16).round() / 16 for tensor in inputs(name)]  # whose sum every type holds
    y, *_ = as_tuple(module(*(tensor.bfloat16() for tensor in tensors)))
    torchs(normalized(tensors))
    assert y.dtype == torch.bfloat16
    for key in BUFFERS:
        torch.testing.assert_close(getattr(module, key), getattr(torchs, key).float())


@pytest.mark.parametrize("name", ADDED)
def test_an_add_module_returns_y_and_total(name, each_backend):
    module, x, residual = made(name).bfloat16(), inputs(name)[0].bfloat16(), inputs(name)[1].float()
    y, total = module(x, residual)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(total, residual + x)
    with pytest.raises(TypeError, match="residual"):
        module(x)


def test_a_branch_whose_last_gamma_is_zero_starts_as_the_identity(each_backend):
    x = normal(2, CHANNELS, 4, 3)
    norm = fused_ops.SwitchNorm2d(CHANNELS, last_gamma=True, activation="relu").to(DEVICE)
    assert torch.equal(norm(3 * x + 1, residual=x), x.relu())
    optimizer = torch.optim.SGD(norm.parameters(), lr=0.1)
    norm(3 * x + 1, residual=x).square().mean().backward()
    optimizer.step()
    assert norm.weight.any()


# --- errors --------------------------------------------------------------------------------------------------------


@each_name
def test_inputs_of_other_dims_are_refused_with_torchs_words(name):
    x, *residual = inputs(name)
    flat = x.flatten(2)[..., 0]
    for bad in (x[None], x[None, None], flat[0], *([] if "1d" in name else [flat])):
        messages = []
        for module in (lambda bad=bad: made(name)(bad, *residual), lambda bad=bad: torchs_batch_norm(name)(bad)):
            with pytest.raises(ValueError) as caught:
                module()
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


@each_name
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_call_that_fails_changes_nothing(name, momentum, each_backend):
    module, (x, residual) = made(name, momentum=momentum), inputs("Add" + name.removeprefix("Add"))
    module(*inputs(name))
    before = {key: buffer.clone() for key, buffer in module.named_buffers()}
    one = x[:1, ..., :1].mean(tuple(range(2, x.dim())), keepdim=True)
    for bad in ((x[:, :3], residual[:, :3]), (x, residual[:1]), (x.long(), residual), (one, one)):
        with pytest.raises(ValueError):
            module(*bad)
        torch.testing.assert_close(dict(module.named_buffers()), before, rtol=0, atol=0)
    assert as_tuple(module.eval()(one, one))[0].shape == one.shape


# --- construction and state ----------------------------------------------------------------------------------------


@each_name
@pytest.mark.parametrize("last_gamma", [False, True])
def test_a_new_module(name, last_gamma):
    module = getattr(fused_ops, name)(CHANNELS, last_gamma=last_gamma)
    assert list(module.state_dict()) == [*PARAMETERS, *BUFFERS]
    assert tuple(dict(module.named_parameters())) == PARAMETERS and tuple(dict(module.named_buffers())) == BUFFERS
    expected = {"weight": torch.full((CHANNELS,), 0.0 if last_gamma else 1.0), "bias": torch.zeros(CHANNELS)}
    expected |= {"mean_weight": torch.ones(3), "var_weight": torch.ones(3)}
    expected |= {"running_mean": torch.zeros(CHANNELS), "running_var": torch.ones(CHANNELS)}
    torch.testing.assert_close(dict(module.state_dict()), expected, rtol=0, atol=0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(3)
    module.reset_parameters()
    torch.testing.assert_close(dict(module.state_dict()), expected, rtol=0, atol=0)


@each_name
def test_the_constructor_takes_its_arguments_by_place_and_by_name(name):
    cls = getattr(fused_ops, name)
    by_name = {"num_features": 4, "eps": 0.5, "momentum": 0.25, "last_gamma": True}
    for module in (cls(*by_name.values(), device="meta", dtype=torch.float64), cls(**by_name).to("meta").double()):
        assert (module.num_features, module.eps, module.momentum, module.last_gamma) == (4, 0.5, 0.25, True)
        assert {(t.dtype, t.device.type) for t in module.state_dict().values()} == {(torch.float64, "meta")}
    with pytest.raises(TypeError):
        cls(*by_name.values(), "gelu")
    with pytest.raises(ValueError, match="'swish'"):
        cls(4, activation="swish")


@each_name
def test_the_repr_shows_what_is_set(name):
    cls = getattr(fused_ops, name)
    assert repr(cls(5)) == f"{name}(5, eps=1e-05, momentum=0.1)"
    shown = repr(cls(5, eps=0.5, momentum=None, last_gamma=True, activation="gelu"))
    assert shown == f"{name}(5, eps=0.5, momentum=None, last_gamma=True, activation=Activation('gelu'))"


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_name
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_a_copy_is_equal_and_independent(name, duplicate, momentum):
    module = made(name, activation=Activation("leaky_relu", negative_slope=0.2), momentum=momentum)
    twin = duplicate(module)
    assert type(twin) is type(module) and repr(twin) == repr(module)
    outputs = [as_tuple(one(*inputs(name))) for one in (module, twin)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    twin(*inputs(name, seed=5))
    torch.testing.assert_close(dict(module.state_dict()), state, rtol=0, atol=0)
    assert not torch.equal(twin.running_mean, module.running_mean)
    module.load_state_dict(twin.state_dict(), strict=True)
    torch.testing.assert_close(module.eval()(*inputs(name)), twin.eval()(*inputs(name)), rtol=0, atol=0)


@each_name
def test_a_meta_module_becomes_real(name):
    module = getattr(fused_ops, name)(CHANNELS, device="meta", dtype=torch.float64, activation="silu")
    for output in as_tuple(module(*(tensor.to("meta") for tensor in inputs(name)))):
        assert output.is_meta and output.shape == inputs(name)[0].shape
    module = module.to_empty(device=DEVICE)
    module.reset_parameters()
    fresh = getattr(fused_ops, name)(CHANNELS, activation="silu", device=DEVICE, dtype=torch.float64)
    torch.testing.assert_close(module(*inputs(name)), fresh(*inputs(name)), rtol=0, atol=0)
    torch.testing.assert_close(dict(module.named_buffers()), dict(fresh.named_buffers()), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", ["SwitchNorm2d", "AddSwitchNorm1d"])
def test_a_compiled_and_a_traced_module_are_the_module(name):
    torch._dynamo.reset()
    module = made(name, activation="gelu")
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for training in (True, False):
        module.train(training), twin.train(training)
        tensors, results = inputs(name), []
        for run, owner in ((module, module), (compiled, twin)):
            outputs = as_tuple(run(*tensors))
            results.append((outputs, torch.autograd.grad(scalar(outputs), tuple(owner.parameters()))))
        torch.testing.assert_close(*results)
        torch.testing.assert_close(dict(twin.named_buffers()), dict(module.named_buffers()))
    traced = torch.jit.trace(module.eval(), inputs(name))
    torch.testing.assert_close(traced(*inputs(name)), module(*inputs(name)))
    torch._dynamo.reset()
