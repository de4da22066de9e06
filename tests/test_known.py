"""Calls that came before: one like it is decided once, one that differs in anything that matters is decided anew."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fused_ops
from fused_ops import functional as F
from fused_ops import known
from tests.conftest import DEVICE

Tensor = torch.Tensor

C = 8
OF_CHANNELS = {
    "group_norm": lambda x, **options: F.group_norm(x, 2, parameter(), parameter(), **options),
    "instance_norm": lambda x, **options: F.instance_norm(x, None, None, parameter(), parameter(), **options),
    "batch_norm": lambda x, **options: F.batch_norm(x, None, None, parameter(), parameter(), training=True, **options),
    "switch_norm": lambda x, **options: F.switch_norm(
        x, None, None, parameter(), parameter(), parameter()[:3], parameter()[:3], training=True, **options
    ),
}
ROWS = {
    "layer_norm": lambda x, **options: F.layer_norm(x, (C,), parameter(), parameter(), **options),
    "rms_norm": lambda x, **options: F.rms_norm(x, (C,), parameter(), **options),
}
FUNCTIONS: dict[str, Callable[..., Tensor]] = {**ROWS, **OF_CHANNELS}
every_function = pytest.mark.parametrize("function", FUNCTIONS)


def parameter() -> Tensor:
    return torch.linspace(0.5, 1.5, C, device=DEVICE)


def image(**options: Any) -> Tensor:
    """[4, C, 2, C], so that it is rows of C elements as well as planes of C channels."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, C, 2, C, generator=generator).to(DEVICE, **options)


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Grows with every call that is decided, by whether somebody looked into it."""
    made: list[bool] = []
    original = known.find

    def noting(function: str, plan: Any, options: Any, tensors: Any, **inner: int) -> Any:
        def noted(*arguments: Any) -> Any:
            made.append(known.watched())
            return plan(*arguments)

        return original(function, noted, options, tensors, **inner)

    monkeypatch.setattr(known, "find", noting)
    yield made


@every_function
def test_a_call_is_decided_once(function, decisions, each_backend):
    call = FUNCTIONS[function]
    first, second = call(image()), call(image())
    assert torch.equal(first, second)
    assert len(decisions) == 1


@every_function
def test_the_call_that_came_last_is_found_at_a_look(function, monkeypatch, each_backend):
    call = FUNCTIONS[function]
    first = call(image())
    monkeypatch.setattr(known, "signature", None)
    assert torch.equal(call(image()), first)


@every_function
def test_a_tensor_may_be_there_twice(function, decisions, each_backend):
    call, x = FUNCTIONS[function], image()
    results = [call(x, residual=x) for _ in range(2)] + [call(x, residual=image())]
    assert len(decisions) == 1
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[2])


def negated(x: Tensor) -> Tensor:
    """A view with the same memory, shape and strides, which torch negates as it reads."""
    return torch._neg_view(x)


CHANGES: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "strides": lambda call: call(image().transpose(0, 2).contiguous().transpose(0, 2)),
    "dtype": lambda call: call(image(dtype=torch.float64)),
    "requires_grad": lambda call: call(image().requires_grad_()),
    "negated": lambda call: call(negated(image())),
    "eps": lambda call: call(image(), eps=0.25),
    "activation": lambda call: call(image(), activation=fused_ops.Activation("leaky_relu", negative_slope=0.5)),
    "residual": lambda call: call(image(), residual=image()),
}


@pytest.mark.parametrize("change", CHANGES)
@every_function
def test_a_call_that_differs_is_decided_anew(function, change, decisions, each_backend):
    call = FUNCTIONS[function]
    call(image())
    found = CHANGES[change](call)
    assert len(decisions) == 2
    known.forget()
    assert torch.equal(found, CHANGES[change](call))


@every_function
def test_rows_may_be_more_or_fewer_and_planes_may_not(function, decisions, each_backend):
    def found(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.requires_grad_()
        y = FUNCTIONS[function](x, activation="silu")
        return y, *torch.autograd.grad(y, x, x.detach() ** 2)

    shapes = [image(), image()[:3], image()[1:2], image()[0, 0], image()[:0]]
    several = shapes if function in ROWS else shapes[:2]
    results = [found(x) for x in several]
    # Of no rows there is nothing to launch.
    assert len(decisions) == 2
    for x, result in zip(several, results, strict=True):
        known.forget()
        assert all(map(torch.equal, result, found(x.detach())))


def test_modes_are_told_apart(decisions):
    def call() -> Tensor:
        return F.layer_norm(image().requires_grad_(), C)

    call()
    with torch.no_grad():
        call()
    with fused_ops.use_backend("torch"):
        call()
    try:
        torch.set_autocast_enabled("cuda", True)
        call()
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert len(decisions) == 4


def test_an_activation_module_is_read_each_time(each_backend):
    module = torch.nn.LeakyReLU(0.5)
    x = image()
    before = F.layer_norm(x, C, activation=module)
    module.negative_slope = 0.25
    after = F.layer_norm(x, C, activation=module)
    assert torch.equal(after, torch.where(before < 0, before / 2, before))


class Watching(TorchDispatchMode):
    """A mode that lets every operation pass."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")  # torch's own
@every_function
def test_nothing_is_known_to_who_looks_into_a_call(function, decisions, each_backend):
    call = FUNCTIONS[function]
    call(image())
    torch.func.vmap(call)(image()[None])
    with torch.autograd.forward_ad.dual_level():
        call(image())
    with torch._subclasses.FakeTensorMode():
        call(torch.empty(4, C, 2, C, device=DEVICE))
    torch.jit.trace(call, image(), check_trace=False)
    with Watching():
        call(image())
    assert decisions == [False, True, True, True, True, True]


@every_function
def test_what_has_left_a_transform_is_not_taken_for_what_lies_in_memory(function, decisions, each_backend):
    kept: list[Tensor] = []

    def escape(x: Tensor) -> Tensor:
        kept.append(x)
        return x.sum()

    torch.func.grad(escape)(image())
    call = FUNCTIONS[function]
    call(negated(image()))
    expected = call(image().requires_grad_(kept[0].requires_grad))
    torch.testing.assert_close(call(kept[0]), expected)
    assert len(decisions) == 3


class Intercepting(TorchFunctionMode):
    """Notes the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Tagged(torch.Tensor):
    """A tensor that notes the functions it is given to."""

    seen: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_who_intercepts_functions_sees_those_of_torch_nn(torch_backend):
    FUNCTIONS["layer_norm"](image())
    with Intercepting() as mode:
        FUNCTIONS["layer_norm"](image())
    FUNCTIONS["layer_norm"](image().as_subclass(Tagged))
    assert torch.nn.functional.layer_norm in mode.seen
    assert torch.nn.functional.layer_norm in Tagged.seen


def test_a_wrong_call_stays_wrong_after_a_right_one(each_backend):
    x = torch.randn(4, C, device=DEVICE)
    F.layer_norm(x, (C,))
    for _ in range(2):
        with pytest.raises(TypeError, match="normalized_shape"):
            F.layer_norm(x, (float(C),))  # type: ignore[arg-type]
        for shape in ((C + 1,), (1, C)):
            with pytest.raises(ValueError, match="weight"):
                F.layer_norm(x, (C,), torch.ones(shape, device=DEVICE))
        F.layer_norm(x, (C,), parameter(), residual=x)
        with pytest.raises(ValueError, match="residual"):
            F.layer_norm(x, (C,), parameter(), residual=x[:2])
    F.group_norm(image(), 2)
    with pytest.raises(TypeError, match="num_groups"):
        F.group_norm(image(), 2.0)  # type: ignore[arg-type]


def test_it_does_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(known._decisions, "most", 3)
    for samples in range(1, 9):
        F.group_norm(torch.randn(samples, C, 3, device=DEVICE), 2)
        F.layer_norm(torch.randn(samples, C, device=DEVICE), C)
        assert len(known._decisions._by_key) <= 3 and len(known._decisions._of_late) <= 3


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_no_tensor_is_kept(dropout_p, each_backend):
    tensors = [image().requires_grad_(), image().requires_grad_(), parameter().requires_grad_()]
    y, total = F.add_layer_norm(*tensors[:2], C, tensors[2], dropout_p=dropout_p)
    (y.sum() + total.sum()).backward()
    places = [weakref.ref(tensor) for tensor in tensors]
    del tensors, y, total
    gc.collect()
    assert [place() for place in places] == [None] * 3


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_known_call_draws_as_an_unknown_one(requires_grad, each_backend):
    x, residual = image().requires_grad_(requires_grad), torch.zeros_like(image())

    def draws() -> list[Tensor]:
        torch.manual_seed(1)
        return [F.add_layer_norm(x, residual, C, dropout_p=0.5)[1].detach() for _ in range(2)]

    first, second = draws(), draws()
    assert not torch.equal(*first)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("packed", ["transposed", "cloned", "negated"])
@every_function
def test_saved_tensors_may_come_back_otherwise(function, packed, triton_backend):
    """After a backward whose saved tensors came back as they went."""

    def gradient() -> Tensor:
        x = image().requires_grad_()
        (found,) = torch.autograd.grad(FUNCTIONS[function](x, activation="silu"), x, image())
        return found

    unpack: dict[str, Callable[[Tensor], Tensor]] = {
        "cloned": torch.clone,
        "transposed": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
        "negated": lambda tensor: negated(-tensor),
    }

    plain = gradient()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack[packed]):
        assert torch.equal(gradient(), plain)


@every_function
def test_gradients_may_come_otherwise(function, each_backend):
    x = image().requires_grad_()
    call = FUNCTIONS[function]
    dense = torch.randn(x.shape, device=DEVICE)
    ways = [dense, dense.transpose(0, 2).contiguous().transpose(0, 2), negated(-dense), dense[..., :1].expand(x.shape)]
    for dy in [*ways, *ways]:
        (found,) = torch.autograd.grad(call(x), x, dy)
        known.forget()
        (expected,) = torch.autograd.grad(call(x), x, dy.clone())
        torch.testing.assert_close(found, expected)


def test_fewer_gradients_may_be_asked_for(triton_backend):
    x, weight = image().requires_grad_(), parameter().requires_grad_()

    def found(*inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.layer_norm(x, C, weight, activation="relu").square().sum(), inputs)

    (of_x,), (of_weight,), both = found(x), found(weight), found(x, weight)
    assert torch.equal(of_x, both[0]) and torch.equal(of_weight, both[1])


@every_function
def test_gradients_may_be_differentiated_after_plain_ones(function, triton_backend):
    x = image(dtype=torch.float64).requires_grad_()

    def gradient(create_graph: bool) -> Tensor:
        dy = image(dtype=torch.float64)
        (found,) = torch.autograd.grad(FUNCTIONS[function](x), x, dy, create_graph=create_graph)
        return found

    plain = gradient(False)
    second = gradient(True)
    torch.testing.assert_close(second, plain)
    (of_known,) = torch.autograd.grad(second.square().sum(), x)
    known.forget()
    (expected,) = torch.autograd.grad(gradient(True).square().sum(), x)
    torch.testing.assert_close(of_known, expected)


AUTOCAST: dict[str, Callable[..., Any]] = {
    "layer_norm": lambda f, x, r: f.layer_norm(x, C, parameter(), residual=r, activation="gelu"),
    "add_layer_norm": lambda f, x, r: f.add_layer_norm(x, r, C, parameter(), activation="gelu"),
    "group_norm": lambda f, x, r: f.group_norm(x, 2, parameter(), residual=r, activation="gelu"),
    "add_group_norm": lambda f, x, r: f.add_group_norm(x, r, 2, parameter(), activation="gelu"),
}


@pytest.mark.parametrize("function", AUTOCAST)
def test_under_autocast_calls_are_known(function, decisions, monkeypatch, each_backend):
    """As on a GPU, where it runs norms in float32; a residual that is added first is added in half."""
    for module in ("row_dispatch", "channel_dispatch"):
        place = importlib.import_module(f"fused_ops.functional.{module}")
        monkeypatch.setattr(place, "_autocasts", lambda x: x.dtype == torch.bfloat16)
    x, residual = image(dtype=torch.bfloat16), image(dtype=torch.bfloat16) / 2
    call = AUTOCAST[function]
    first, second = (call(F, x, residual) for _ in range(2))
    assert len(decisions) == 1
    if function.startswith("add"):
        assert (first[0].dtype, first[1].dtype) == (torch.float32, torch.bfloat16)
        expected = call(F, (x + residual).float(), torch.zeros(x.shape, device=DEVICE))[0]
        assert all(map(torch.equal, first, second))
        assert torch.equal(first[1], x + residual)
    else:
        expected = call(F, x.float(), residual.float())
        assert torch.equal(first, second)
    torch.testing.assert_close(first[0] if isinstance(first, tuple) else first, expected)


@every_function
def test_what_is_compiled_does_not_ask_what_is_known(function, each_backend):
    """Else it would be compiled again with every call that others make."""
    call = torch.compile(FUNCTIONS[function], backend="eager", fullgraph=function != "switch_norm")
    call(image())
    F.layer_norm(torch.randn(3, 5, device=DEVICE), 5)
    F.group_norm(torch.randn(3, 4, 5, device=DEVICE), 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        call(image())
    known.forget()
    with torch.compiler.set_stance("fail_on_recompile"):
        call(image())
