"""One module's own forward as a graph, its children as they are; and what has to hold for the graph to stand for it.

torch.fx runs the forward with a stand-in for every tensor, and so decides every branch once. What a branch may go by is
noted, and asked again in each call (`Plan.match`); where a forward goes by what cannot be asked again it is not traced.
"""

from __future__ import annotations

import contextlib
import dis
import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Graph, Proxy, Tracer
from torch.utils._python_dispatch import TorchDispatchMode

from .stand_in import CallsOfC, StandIn, asked_by
from .state import Generators, Held

# Read by a forward, and cheap to compare in every call.
SCALARS = (bool, int, float, str, type(None), torch.dtype)


class Untraceable(Exception):
    """Why no graph stands for a module's forward."""


class Given(NamedTuple):
    """What a call gives to a parameter of forward: something of this class (of any: object), or nothing but this
    constant."""

    of_class: type | None
    constant: Any = None

    def fits(self, value: Any) -> bool:
        if self.of_class is not None:
            return isinstance(value, self.of_class)
        return value is self.constant or (isinstance(value, SCALARS) and is_still(value, self.constant))


def is_still(value: Any, before: Any) -> bool:
    """Whether what was a scalar is that one; it may have become anything."""
    return type(value) is type(before) and bool(value == before)


class Traced(NamedTuple):
    graph: Graph
    attributes: dict[str, Any]
    """The scalars that forward read of its module, with their values: what its branches may go by."""


def given_by(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Given]:
    """How a call that was seen is given: scalars as they are, all else by class."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    names: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            raise Untraceable("its forward takes any number of arguments")
        names |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return {name: _given(value) for name, value in names.items()}


def _given(value: Any) -> Given:
    if isinstance(value, SCALARS):
        return Given(None, value)
    return Given(torch.Tensor if isinstance(value, torch.Tensor) else type(value))


def given_by_default(module: nn.Module) -> dict[str, Given]:
    """A call with a tensor for each parameter that has no default."""
    given = {}
    for name, parameter in inspect.signature(module.forward).parameters.items():
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            raise Untraceable("what its forward takes is seen in an example alone: give fuse example_inputs")
        if parameter.default is inspect.Parameter.empty:
            given[name] = Given(torch.Tensor)
    return given


def trace(module: nn.Module, given: Mapping[str, Given], grad: bool = True) -> Traced:
    """The graph of module.forward for such calls, in the mode it is in. Untraceable says why there is none."""
    before = type(module)
    attributes: dict[str, Any] = {}
    numbers, held = Generators(), Held(module, *module.children())
    tracer = _OneForward(given)
    try:
        module.__dict__["_reads"] = attributes
        module.__class__ = _recording(before)
        _refuse_what_no_graph_has(module)
        with torch.set_grad_enabled(grad), _NothingComputed(), tracer.calls:
            graph = tracer.trace(module)
            graph.lint()
    except Untraceable:
        raise
    except Exception as error:  # of a forward that is given stand-ins: of any kind
        raise Untraceable(f"torch.fx cannot trace its forward: {_first_line(error)}") from error
    finally:
        object.__setattr__(module, "__class__", before)
        module.__dict__.pop("_reads", None)
        drawn, changed = numbers.put_back(), held.put_back()
    if tracer.refused is not None:  # and its forward caught that
        raise tracer.refused
    if changed:
        raise Untraceable("its forward changes a list or a dict that it holds, or a child")
    if drawn:
        raise Untraceable("its forward draws a random number that is no tensor")
    return Traced(graph, attributes)


def trace_whatever_grad(module: nn.Module, given: Mapping[str, Given]) -> Traced:
    """As `trace`, of a forward that is one graph whether gradients are on or not."""
    traced, without = (trace(module, given, grad=grad) for grad in (True, False))
    if traced.graph.python_code("self").src != without.graph.python_code("self").src:
        raise Untraceable("its forward goes by whether gradients are on")
    return traced


def _refuse_what_no_graph_has(module: nn.Module) -> None:
    """Raises Untraceable where the forward asks what a stand-in does not notice."""
    code = getattr(inspect.unwrap(module.forward), "__code__", None)
    for instruction in () if code is None else dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL" and instruction.argval == "type":
            raise Untraceable("its forward goes by the exact type of something")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _OneForward(Tracer):
    """Traces a module's own forward; a call of any other module is one node."""

    proxy_buffer_attributes = True

    def __init__(self, given: Mapping[str, Given]) -> None:
        super().__init__()
        self.given = given
        self.refused: Untraceable | None = None
        self.calls = CallsOfC(self.refuse)

    def refuse(self, why: str) -> Untraceable:
        """What to raise; known afterwards, too, should the forward catch it."""
        self.refused = Untraceable(why)
        return self.refused

    def to_bool(self, obj: Proxy) -> bool:
        raise self.refuse("its forward goes by the values of a tensor")

    def iter(self, obj: Proxy) -> Iterator[Proxy]:
        raise self.refuse("its forward goes through what it computes one by one")

    def keys(self, obj: Proxy) -> Any:
        raise self.refuse("its forward goes through what it computes one by one")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        self.ambient = _ambient()
        arguments = {
            name: given.constant if given.of_class is None else self._placeholder(name, given.of_class)
            for name, given in self.given.items()
        }

        def forward(module: nn.Module) -> Any:
            return _plain(root_fn(module, **arguments))

        return forward, [self.root]

    def _placeholder(self, name: str, of_class: type) -> Proxy:
        node = self.create_node("placeholder", name, (), {})
        return StandIn(node, self, None if of_class is object else of_class)

    def proxy(self, node: Any) -> Proxy:
        return StandIn(node, self, None)

    def create_node(self, *args: Any, **kwargs: Any) -> Any:
        if _ambient() != self.ambient:
            raise Untraceable("its forward changes the mode of autograd or autocast")
        if _within("torch.utils.checkpoint"):
            raise Untraceable("its forward checkpoints a part of itself")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, dict) and type(a) is not dict:
            raise Untraceable(f"its forward makes a {type(a).__name__}")
        return super().create_arg(a)


def _plain(result: Any) -> Any:
    """The result, where it is made of what a graph can return as it is."""
    if type(result) in (tuple, list):
        for part in result:
            _plain(part)
    elif type(result) is dict:
        for part in result.values():
            _plain(part)
    elif type(result) is not StandIn and not (isinstance(result, SCALARS)):
        raise Untraceable(f"its forward returns a {type(result).__name__}")
    return result


def _ambient() -> tuple[Any, ...]:
    """What a with statement around an operation may change of it, and a graph does not keep."""
    autocast = [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _within(module_name: str) -> bool:
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") != __name__:
        if frame.f_globals.get("__name__") == module_name:
            return True
        frame = frame.f_back
    return False


class _NothingComputed(TorchDispatchMode):
    """Refuses operations on tensors: while a forward is traced, what it computes is a constant in the graph."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Untraceable(f"its forward computes with tensors of its own ({func})")


def _recording(cls: type[nn.Module]) -> type[nn.Module]:
    """The class, of a module that notes which scalars its forward reads of it, and refuses to be changed."""

    def noted(module: Any, name: str, value: Any) -> Any:
        if isinstance(value, SCALARS) and not asked_by("torch", levels=3):
            module.__dict__["_reads"][name] = value
        return value

    def get(self: Any, name: str) -> Any:
        value = super(recording, self).__getattribute__(name)
        return value if name.startswith("__") else noted(self, name, value)

    def get_otherwise(self: Any, name: str) -> Any:
        return noted(self, name, super(recording, self).__getattr__(name))

    def change(self: Any, name: str, value: Any) -> None:
        raise Untraceable(f"its forward changes {name}")

    members = {
        "__getattribute__": get,
        "__getattr__": get_otherwise,
        "__setattr__": change,
        "__module__": cls.__module__,
    }
    recording: Any = type(cls.__name__, (cls,), members)
    return recording


@contextlib.contextmanager
def training_set_to(module: nn.Module, training: bool) -> Iterator[None]:
    """The module itself in that mode, its children as they are."""
    before = module.training
    module.training = training
    try:
        yield
    finally:
        module.training = before
