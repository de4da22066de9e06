"""A fused forward: the function of a graph, and the calls that it stands for."""

from __future__ import annotations

import importlib
import inspect
import linecache
import pickle
import zlib
from collections.abc import Mapping, Sequence
from types import CodeType, ModuleType
from typing import Any

from torch import nn

from ..activation import Activation, resolve
from .inlining import Inlined
from .patterns import Site
from .sites import NormSite, has_hooks, path_of, submodule
from .state import own_fields
from .tracing import SCALARS, Given, Traced, is_still


class Plan:
    """Runs a module's forward by a graph of it, in calls that find what the graph was traced with.

    given: what each parameter of forward is given; attributes: scalars of the module that its branches went by;
    children: its modules, as far as a forward may go by them; skipped: those that are not called, with their class and
    settings;
    norms: those that are called with more than they were; inlined: those whose forward is in the graph.
    """

    def __init__(
        self,
        module: nn.Module,
        traced: Traced,
        given: Mapping[str, Given],
        sites: Sequence[Site],
        inlined: Sequence[Inlined] = (),
    ) -> None:
        parameters = inspect.signature(module.forward).parameters
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.sites = tuple(sites)
        self.positional = tuple(name for name, parameter in parameters.items() if parameter.kind in positional)
        self.given = dict(given)
        self.defaults = {
            name: parameter.default
            for name, parameter in parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
        for name, default in self.defaults.items():
            self.given.setdefault(name, Given(None, default))
        self.attributes = dict(traced.attributes)
        self.children = children_of(module)
        skipped = dict.fromkeys(name for site in sites for name in site.skipped)
        beside = [(path_of(name), module.get_submodule(name)) for name in skipped]
        self.skipped = tuple((path, type(activation), settings_of(activation)) for path, activation in beside)
        self.norms = tuple(dict.fromkeys(path_of(site.norm) for site in sites if site.norm))
        self.inlined = tuple(inlined)
        code = traced.graph.python_code("self")
        self.source = code.src
        scope = {**code.globals, "Activation": _activation}
        used = {name: scope[name] for name in _names(compile(self.source, "", "exec")) if name in scope}
        self.modules = {name: value.__name__ for name, value in used.items() if isinstance(value, ModuleType)}
        self.globals = {name: value for name, value in used.items() if name not in self.modules}
        self._compile()

    def _compile(self) -> None:
        scope = {**self.globals, **{name: importlib.import_module(module) for name, module in self.modules.items()}}
        name = f"<fused forward {zlib.crc32(self.source.encode()):x}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(keepends=True), name)
        exec(compile(self.source, name, "exec"), scope)
        self.run = scope["forward"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "run"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._compile()

    def match(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any] | None:
        """The arguments of `run` for a call of the module, or None where it has to be run as it was."""
        if len(args) > len(self.positional) or not _has_children(module, self.children):
            return None
        for name, value in self.attributes.items():
            if not is_still(getattr(module, name, ...), value):
                return None
        for child in self.inlined:
            if not child.holds(module):
                return None
        for path in self.norms:
            norm = submodule(module, path)
            if not isinstance(norm, NormSite) or has_hooks(norm):
                return None
        for path, cls, settings in self.skipped:
            beside = submodule(module, path)
            if beside is None or type(beside) is not cls or has_hooks(beside):
                return None
            if settings and not all(is_still(getattr(beside, name, ...), value) for name, value in settings):
                return None
        found = dict(zip(self.positional, args, strict=False))
        found.update(kwargs)
        values = []
        for name, given in self.given.items():
            value = found.pop(name, self.defaults.get(name, ...))
            if not given.fits(value):
                return None
            if given.of_class is not None:
                values.append(value)
        return None if found else values


def _activation(name: str, **parameters: float) -> Activation | None:
    """What the source of a graph calls `Activation`: made in each call only where it has parameters."""
    return Activation(name, **parameters) if parameters else resolve(name)


def settings_of(activation: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The scalars by which an activation may go."""
    held = own_fields(activation).items()
    return tuple((name, value) for name, value in held if isinstance(value, SCALARS) and name != "inplace")


def children_of(module: nn.Module) -> tuple[Any, ...]:
    """The names of a module's children, whether each is None, and of containers, which a forward may go through, the
    same again."""
    children = module._modules.items()
    return tuple([(name, children_of(c) if isinstance(c, _CONTAINERS) else c is None) for name, c in children])


def _has_children(module: nn.Module, children: tuple[Any, ...]) -> bool:
    """``children_of(module) == children``, in a third of its time, for what runs in each call."""
    modules = module._modules
    if len(modules) != len(children):
        return False
    for (name, child), (seen, inner) in zip(modules.items(), children, strict=True):
        if name != seen:
            return False
        if isinstance(child, _CONTAINERS):
            if inner.__class__ is not tuple or not _has_children(child, inner):
                return False
        elif inner is not (child is None):
            return False
    return True


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _names(code: CodeType) -> set[str]:
    """What a code object, or one in it, may look up."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def can_be_kept(plan: Plan) -> bool:
    """Whether the plan can be copied and pickled, as the module that has it must be."""
    try:
        pickle.loads(pickle.dumps(plan))
    except Exception:  # whatever the objects in it raise
        return False
    return True
