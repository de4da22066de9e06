"""BatchNorm as modules: torch.nn's constructors, state, running statistics over several steps, and checks."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import pickle
from collections.abc import Callable
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
PLAIN = tuple(f"BatchNorm{dims}d" for dims in (1, 2, 3))
ADDED = tuple(f"Add{name}" for name in PLAIN)
NAMES = PLAIN + ADDED
each_name = pytest.mark.parametrize("name", NAMES)
each_added = pytest.mark.parametrize("name", ADDED)


def torchs_class(name: str) -> type[nn.Module]:
    return getattr(nn, name.removeprefix("Add"))


def inputs(name: str, batch: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    """x, and the residual that an Add module needs."""
    shape = (batch, CHANNELS, *(4, 3, 2)[: int(name[-2])])
    return tuple(normal(*shape, dtype=dtype, seed=seed + i) for i in range(1 + name.startswith("Add")))


def made(name: str, cls: type | None = None, **kwargs: Any) -> Any:
    """A module whose parameters are no longer ones and zeros."""
    kwargs = {"device": DEVICE, "dtype": torch.float64} | kwargs
    module = (cls or getattr(fused_ops, name))(CHANNELS, **kwargs)
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(*parameter.shape, dtype=torch.float64, seed=seed + 10))
    return module


def pair(name: str, activation: Any = None, **kwargs: Any) -> tuple[Any, nn.Module]:
    """Ours, and torch.nn's."""
    return made(name, activation=activation, **kwargs), made(name, torchs_class(name), **kwargs)


def expected_of(torchs: nn.Module, x: Tensor, *residual: Tensor) -> tuple[Tensor, ...]:
    total = residual[0] + x if residual else x
    return (torchs(total), *((total,) if residual else ()))


def assert_same_step(module: nn.Module, torchs: nn.Module, name: str, seed: int, **keywords: Any) -> None:
    """Outputs, buffers, and the gradients of inputs and parameters."""
    results = []
    for run, owner in ((module, module), (lambda *t: expected_of(torchs, *t), torchs)):
        tensors = [tensor.requires_grad_() for tensor in inputs(name, seed=seed, **keywords)]
        outputs = as_tuple(run(*tensors))
        results.append((outputs, torch.autograd.grad(scalar(outputs), (*tensors, *owner.parameters()))))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(dict(module.named_buffers()), dict(torchs.named_buffers()))


# --- against torch -------------------------------------------------------------------------------------------------


@pytest.mark.one_in(8)
@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("track_running_stats", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("affine", [True, False])
@each_name
def test_three_steps_and_an_evaluation_are_torchs(name, affine, momentum, track_running_stats, eps, each_backend):
    keywords = {"affine": affine, "momentum": momentum, "track_running_stats": track_running_stats, "eps": eps}
    module, torchs = pair(name, **keywords)
    for seed in range(3):
        assert_same_step(module, torchs, name, 10 * seed, batch=2 + seed)
    module.eval(), torchs.eval()
    assert_same_step(module, torchs, name, 50)
    if track_running_stats:
        assert_same_step(module, torchs, name, 60, batch=1)  # whose own statistics nobody needs
        assert module.num_batches_tracked == 3
    module.train(), torchs.train()
    assert_same_step(module, torchs, name, 70)


@pytest.mark.one_in(3)
@each_name
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("removed", ["running statistics", "counter"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_buffers_that_are_set_to_none_are_torchs(name, training, removed, momentum, each_backend):
    """Without running statistics it takes the batch's in evaluation as well, and counts in training."""
    module, torchs = (module.train(training) for module in pair(name, momentum=momentum))
    for one in (module, torchs):
        if removed == "counter":
            one.num_batches_tracked = None
        else:
            one.running_mean = one.running_var = None
    for seed in range(2):
        assert_same_step(module, torchs, name, 10 * seed)


@each_name
def test_one_running_statistic_alone_is_refused(name, each_backend):
    for training in (True, False):
        module, torchs = (module.train(training) for module in pair(name))
        module.running_var = torchs.running_var = None
        for call in (lambda m=module: m(*inputs(name)), lambda t=torchs: t(inputs(name)[0])):
            with pytest.raises((ValueError, RuntimeError), match="running_var"):
                call()


@each_name
def test_what_is_switched_later_is_as_torchs(name, each_backend):
    """track_running_stats as an attribute, and a momentum: both are read when it is called."""
    module, torchs = pair(name)
    for seed, (attribute, value) in enumerate(
        [("track_running_stats", False), ("momentum", None), ("track_running_stats", True), ("momentum", 0.5)]
    ):
        setattr(module, attribute, value), setattr(torchs, attribute, value)
        for training in (True, False):
            module.train(training), torchs.train(training)
            assert_same_step(module, torchs, name, 10 * seed)


@pytest.mark.parametrize("name", ["BatchNorm1d", "AddBatchNorm1d"])
@pytest.mark.parametrize("training", [True, False])
def test_rows_are_planes_of_one_element(name, training, each_backend):
    module, torchs = (module.train(training) for module in pair(name))
    tensors = [tensor[..., 0] for tensor in inputs(name, 4)]
    torch.testing.assert_close(as_tuple(module(*tensors)), expected_of(torchs, *tensors))
    torch.testing.assert_close(dict(module.named_buffers()), dict(torchs.named_buffers()))


@each_name
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_module_in_another_type_returns_that_type(name, dtype, each_backend):
    module, (_, torchs) = made(name, activation="relu").to(dtype), pair(name)
    outputs = as_tuple(module(*inputs(name, dtype=dtype)))
    assert (
        {output.dtype for output in outputs} == {dtype} == {buffer.dtype for buffer in module.buffers()} - {torch.int64}
    )
    scalar(outputs).backward()
    assert all(parameter.grad.dtype == dtype for parameter in module.parameters())
    expected_of(torchs, *inputs(name))
    loose = {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(dict(module.double().named_buffers()), dict(torchs.named_buffers()), **loose)


@each_name
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_input_moves_float32_statistics(name, dtype, each_backend):
    module, torchs = pair(name)
    tensors = [(tensor * 16).round() / 16 for tensor in inputs(name)]  # whose sum every type holds
    y, *_ = as_tuple(module.float()(*(tensor.to(dtype) for tensor in tensors)))
    expected_of(torchs, *tensors)
    assert y.dtype == dtype
    torch.testing.assert_close(dict(module.named_buffers()), dict(torchs.float().named_buffers()))


# --- residual and activation ---------------------------------------------------------------------------------------


@each_name
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_forward_is_the_functional_call(name, activation, affine, training, each_backend):
    module = made(name, affine=affine, eps=0.25, activation=activation).train(training)
    function = F.add_batch_norm if name.startswith("Add") else F.batch_norm
    x, residual = inputs("Add" + name.removeprefix("Add"))
    running = [copy.deepcopy(buffer) for buffer in (module.running_mean, module.running_var)]
    keywords = {"weight": module.weight, "bias": module.bias, "eps": 0.25, "activation": activation}
    expected = function(
        x, residual=residual, running_mean=running[0], running_var=running[1], training=training, **keywords
    )
    given = module(x=x, residual=residual)
    assert isinstance(given, tuple) == isinstance(expected, tuple) == name.startswith("Add")
    assert all(torch.equal(a, b) for a, b in zip(as_tuple(given), as_tuple(expected), strict=True))
    assert all(map(torch.equal, (module.running_mean, module.running_var), running))


@each_added
def test_an_add_module_returns_y_and_total(name, each_backend):
    module, x, residual = made(name).bfloat16(), inputs(name)[0].bfloat16(), inputs(name)[1].float()
    y, total = module(x, residual)
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(total, residual + x)
    with pytest.raises(TypeError, match="residual"):
        module(x)


def test_modules_stand_in_a_network(each_backend):
    class Block(nn.Module):
        def __init__(self, norms: Any, **keywords: Any) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, CHANNELS, 3, padding=1)
            self.first, self.second = (norms.BatchNorm2d(CHANNELS, **keywords) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            z = self.conv(x)
            if isinstance(self.first, fused_ops.BatchNorm2d):
                return self.second(self.first(z), residual=z)
            return self.second(self.first(z).relu()).add(z).relu()

    ours, torchs = (block.to(DEVICE, torch.float64) for block in (Block(fused_ops, activation="relu"), Block(nn)))
    torchs.load_state_dict(ours.state_dict())
    for seed in range(2):
        losses = []
        for block in (ours, torchs):
            optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
            loss = block(normal(2, 3, 6, 6, dtype=torch.float64, seed=seed)).square().mean()
            optimizer.zero_grad(), loss.backward(), optimizer.step()
            losses.append(loss)
        torch.testing.assert_close(*losses)
    torch.testing.assert_close(dict(ours.state_dict()), dict(torchs.state_dict()))


# --- errors --------------------------------------------------------------------------------------------------------


def errors(call: Callable[[], Any]) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:
        call()
    return caught.type, str(caught.value)


@each_name
def test_inputs_of_other_dims_are_refused_with_torchs_words(name):
    x, *residual = inputs(name)
    flat = x.flatten(2)[..., 0]
    for bad in (x[None], x[None, None], flat[0], *([] if "1d" in name else [flat])):
        assert errors(lambda x=bad: made(name)(x, *residual)) == errors(lambda x=bad: made(name, torchs_class(name))(x))


@each_name
def test_a_call_that_fails_changes_nothing(name, each_backend):
    """torch counts the call before it looks at it."""
    module, (x, residual) = made(name, momentum=None), inputs("Add" + name.removeprefix("Add"))
    module(*inputs(name))
    before = {key: buffer.clone() for key, buffer in module.named_buffers()}
    for bad in (
        {"x": x[:, :3], "residual": residual[:, :3]},
        {"x": x, "residual": residual[:1]},
        {"x": x.long(), "residual": residual},
        {"x": x[:1, ..., :1].mean(tuple(range(2, x.dim())), keepdim=True), "residual": None},
    ):
        if bad["residual"] is None and name.startswith("Add"):
            bad["residual"] = bad["x"]
        with pytest.raises(ValueError):
            module(**bad)
        torch.testing.assert_close(dict(module.named_buffers()), before, rtol=0, atol=0)


@each_name
def test_one_value_a_channel_is_refused_in_training_alone(name, each_backend):
    module = made(name)
    tensors = [tensor.mean(tuple(range(2, tensor.dim())), keepdim=True) for tensor in inputs(name, batch=1)]
    with pytest.raises(ValueError, match=r"more than 1 value per channel.*\(1, 5, 1"):
        module(*tensors)
    assert as_tuple(module.eval()(*tensors))[0].shape == tensors[0].shape


# --- construction and state ----------------------------------------------------------------------------------------


def described(module: nn.Module) -> dict[str, Any]:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: (tensor.shape, tensor.dtype, tensor.device) for name, tensor in tensors.items()}


@each_name
def test_a_module_is_torchs(name):
    module, torchs = getattr(fused_ops, name)(CHANNELS), torchs_class(name)(CHANNELS)
    assert isinstance(module, torchs_class(name)) and module.activation is None
    assert described(module) == described(torchs)
    own = {key: value for key, value in vars(torchs).items() if key[0] != "_"}
    assert {key: vars(module)[key] for key in own} == own


@each_name
def test_the_constructor_takes_what_torchs_takes_by_place_and_by_name(name):
    cls, torchs = getattr(fused_ops, name), torchs_class(name)
    values = {"num_features": 4, "eps": 0.5, "momentum": 0.25, "affine": True, "track_running_stats": True}
    values |= {"device": torch.device("meta"), "dtype": torch.float64}
    signature = inspect.signature(torchs).parameters
    by_place = [values[p.name] for p in signature.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = {key: values[key] for key in signature if key in values}
    if "bias" in signature:
        keywords["bias"] = False
    for ours, theirs in ((cls(*by_place), torchs(*by_place)), (cls(**keywords), torchs(**keywords))):
        assert described(ours) == described(theirs)
        assert (ours.eps, ours.momentum) == (0.5, 0.25)
    with pytest.raises(TypeError):
        cls(*by_place, "gelu")  # the activation is a keyword, so that torch may add arguments
    with pytest.raises(ValueError, match="'swish'"):
        cls(4, activation="swish")


@each_name
def test_the_state_is_torchs_both_ways(name):
    for affine, tracked in itertools.product((True, False), repeat=2):
        ours, torchs = pair(name, "elu", affine=affine, track_running_stats=tracked)
        ours(*inputs(name))
        assert list(ours.state_dict()) == list(torchs.state_dict())
        torchs.load_state_dict(ours.state_dict(), strict=True)
        fresh = getattr(fused_ops, name)(CHANNELS, affine=affine, track_running_stats=tracked).to(DEVICE, torch.float64)
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
    assert type(twin) is type(module) and repr(twin) == repr(module)
    outputs = [as_tuple(one(*inputs(name))) for one in (module, twin)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    twin(*inputs(name, seed=5))
    torch.testing.assert_close(dict(module.state_dict()), state, rtol=0, atol=0)
    assert twin.num_batches_tracked == 2 and not torch.equal(twin.running_mean, module.running_mean)


@each_name
def test_a_meta_module_becomes_real(name, each_backend):
    module = getattr(fused_ops, name)(CHANNELS, device="meta", dtype=torch.float64, activation="silu")
    for output in as_tuple(module(*(tensor.to("meta") for tensor in inputs(name)))):
        assert output.is_meta and output.shape == inputs(name)[0].shape
    module = module.to_empty(device=DEVICE)
    module.reset_parameters()
    fresh = getattr(fused_ops, name)(CHANNELS, activation="silu", device=DEVICE, dtype=torch.float64)
    torch.testing.assert_close(module(*inputs(name)), fresh(*inputs(name)), rtol=0, atol=0)
    torch.testing.assert_close(dict(module.named_buffers()), dict(fresh.named_buffers()), rtol=0, atol=0)


@each_name
def test_the_repr_is_torchs_and_shows_an_activation_that_is_set(name):
    cls, torchs = getattr(fused_ops, name), torchs_class(name)
    shown = repr(torchs(CHANNELS, eps=0.5)).removeprefix(torchs.__name__)
    assert repr(cls(CHANNELS, eps=0.5)) == name + shown
    assert repr(cls(CHANNELS, eps=0.5, activation="gelu")) == f"{name}{shown[:-1]}, activation=Activation('gelu'))"


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", ["BatchNorm2d", "AddBatchNorm1d"])
def test_a_compiled_and_a_traced_module_are_the_module(name, each_backend):
    torch._dynamo.reset()
    module = made(name, activation="gelu")
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for training in (True, True, False):
        module.train(training), twin.train(training)
        tensors = inputs(name)
        results = []
        for run, owner in ((module, module), (compiled, twin)):
            outputs = as_tuple(run(*tensors))
            results.append((outputs, torch.autograd.grad(scalar(outputs), tuple(owner.parameters()))))
        torch.testing.assert_close(*results)
        torch.testing.assert_close(dict(twin.named_buffers()), dict(module.named_buffers()))
    traced = torch.jit.trace(module.eval(), inputs(name))
    torch.testing.assert_close(traced(*inputs(name)), module(*inputs(name)))
    torch.jit.save(traced, io.BytesIO())
    torch._dynamo.reset()
