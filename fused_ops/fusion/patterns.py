"""Which neighbours of a norm, or of an add, one call computes: found in a graph, and put into it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn import functional as TF

from .. import functional as F
from ..activation import Activation
from ..fallback import activate
from .in_place import IN_PLACE
from .inlining import OF_A_PART
from .probe import activation_of
from .sites import NormSite, has_hooks, joins, summed

_ADDS_IN_PLACE = frozenset({IN_PLACE["iadd"], "add_"})
_ADDS = frozenset({operator.add, torch.add, "add"}) | _ADDS_IN_PLACE
_WRITING_OPERATORS = frozenset({*IN_PLACE.values(), operator.setitem})
# Modules whose result is a tensor that they made.
_MAKING = (NormSite, nn.Linear, nn.modules.conv._ConvNd)
# Functions and methods that are activations, and what may follow their input.
_ACTIVATIONS: dict[Any, tuple[str, tuple[str, ...]]] = {
    **dict.fromkeys((TF.relu, torch.relu, torch.relu_, TF.relu_, "relu", "relu_"), ("relu", ("inplace",))),
    TF.relu6: ("relu6", ("inplace",)),
    TF.leaky_relu: ("leaky_relu", ("negative_slope", "inplace")),
    TF.elu: ("elu", ("alpha", "inplace")),
    TF.selu: ("selu", ("inplace",)),
    TF.gelu: ("gelu", ("approximate",)),
    TF.silu: ("silu", ("inplace",)),
    **dict.fromkeys((torch.sigmoid, TF.sigmoid, "sigmoid", "sigmoid_"), ("sigmoid", ())),
    **dict.fromkeys((torch.tanh, TF.tanh, "tanh", "tanh_"), ("tanh", ())),
    TF.mish: ("mish", ("inplace",)),
    TF.hardswish: ("hardswish", ("inplace",)),
    TF.hardsigmoid: ("hardsigmoid", ("inplace",)),
    TF.softplus: ("softplus", ("beta", "threshold")),
}


class Site(NamedTuple):
    """What one call computes."""

    pattern: str
    norm: str
    """The norm's name within the module whose forward it is in; empty where there is none."""
    skipped: tuple[str, ...]
    """Names of the modules that it is called instead of."""
    of_a_part: bool = False
    """Whether it is a sum in a child's forward, which has it too."""


def add_then_activate(x: Any, residual: Any, activation: Activation, into: str | None = None) -> Tensor:
    """``activation(x + residual)``, by kernel where they are of one shape and type; into as of `summed`."""
    if joins(x, residual):
        return F.residual_add(x, residual, activation=activation)
    return activate(summed(x, residual, into), activation)


def fuse_graph(graph: Graph, module: nn.Module) -> list[Site]:
    """Puts one call where several were, as often as it can."""
    return _Fusing(graph, module).sites


class _Fusing:
    def __init__(self, graph: Graph, module: nn.Module) -> None:
        self.graph, self.module = graph, module
        self.sites: list[Site] = []
        self._fuse(self._norm_with_what_follows)
        self._fuse(self._norm_of_a_sum)
        self._fuse(self._sum_with_activation)
        graph.lint()

    def _fuse(self, of_node: Any) -> None:
        for node in tuple(self.graph.nodes):
            if not node._erased:
                site = of_node(node)
                if site is not None:
                    self.sites.append(site)

    # --- the three ways --------------------------------------------------------------------------------------------

    def _norm_with_what_follows(self, node: Node) -> Site | None:
        """norm -> activation, norm -> add -> activation, norm -> add."""
        norm = self._norm(node)
        if norm is None or norm._own_activation is not None:
            return None
        x, chain = node.args[0], [node]
        value, follower = self._follow(node, chain)
        residual = None if follower is None else self._added(follower, value)
        into = None
        if residual is not None and follower is not None:
            into = self._into(follower, value)
            chain.append(follower)
            value, follower = self._follow(follower, chain)
        activation = None if follower is None else self._activation(follower, value)
        if activation is not None and follower is not None:
            chain.append(follower)
        elif residual is None:
            return None
        while self._is_identity(chain[-1]):  # behind the last that counts
            chain.pop()
        if self._is_written_between(chain, (x, residual)):
            return None
        with self.graph.inserting_before(chain[-1]):
            keywords = {"residual": residual, "activation": activation, "into": into}
            given = {name: value for name, value in keywords.items() if value is not None}
            fused = self.graph.call_module(node.target, (x,), given)  # type: ignore[arg-type]
        chain[-1].replace_all_uses_with(fused)
        return self._site(["norm", "add" if residual is not None else "", activation], node, chain)

    def _norm_of_a_sum(self, node: Node) -> Site | None:
        """add -> norm and add -> norm -> activation; the sum is there for whom else it has."""
        norm = self._norm(node)
        if norm is None:
            return None
        chain: list[Node] = []
        total = self._precede(node.args[0], chain)
        operands = self._operands(total)
        if operands is None or self._is_used_between(total, node, chain):
            return None
        chain = [total, *chain, node]
        activation = norm._own_activation
        behind: list[Node] = []
        value, follower = self._follow(node, behind)
        if activation is None and follower is not None:
            activation = self._activation(follower, value)
            if activation is not None:
                chain += [*behind, follower]
        if self._is_written_between(chain, (*operands, total)):
            return None
        with self.graph.inserting_before(total):
            keywords = {"add_first": True, "activation": activation, "into": self._into(total, operands[0])}
            given = {name: value for name, value in keywords.items() if value is not None}
            both = self.graph.call_module(node.target, operands, given)  # type: ignore[arg-type]
            y = self.graph.call_function(operator.getitem, (both, 0))
            kept = self.graph.call_function(operator.getitem, (both, 1))
        chain[-1].replace_all_uses_with(y)
        total.replace_all_uses_with(kept)
        return self._site(["add", "norm", activation], node, chain)

    def _sum_with_activation(self, node: Node) -> Site | None:
        """add -> activation."""
        operands = self._operands(node)
        if operands is None:
            return None
        chain = [node]
        value, follower = self._follow(node, chain)
        activation = None if follower is None else self._activation(follower, value)
        if activation is None or follower is None:
            return None
        chain.append(follower)
        if self._is_written_between(chain, operands):
            return None
        with self.graph.inserting_before(follower):
            into = self._into(node, operands[0])
            given = {} if into is None else {"into": into}
            fused = self.graph.call_function(add_then_activate, (*operands, activation), given)  # type: ignore[arg-type]
        follower.replace_all_uses_with(fused)
        return self._site(["add", activation], None, chain)

    def _site(self, parts: Iterable[Any], norm: Node | None, chain: Sequence[Node]) -> Site:
        for node in reversed(chain):
            self.graph.erase_node(node)
        names = [part.name if isinstance(part, Activation) else part for part in parts if part]
        skipped = tuple(str(node.target) for node in chain if node.op == "call_module" and node is not norm)
        of_a_part = norm is None and all(OF_A_PART in node.meta for node in chain)
        return Site("+".join(names), "" if norm is None else str(norm.target), skipped, of_a_part)

    # --- what a node is --------------------------------------------------------------------------------------------

    def _called(self, node: Any) -> nn.Module | None:
        """The module that a node calls with one tensor, where nobody listens."""
        if not isinstance(node, Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        module = self.module.get_submodule(str(node.target))
        return module if isinstance(node.args[0], Node) and not has_hooks(module) else None

    def _norm(self, node: Node) -> NormSite | None:
        called = self._called(node)
        return called if isinstance(called, NormSite) else None

    def _is_identity(self, node: Node) -> bool:
        return type(self._called(node)) is nn.Identity

    def _activation(self, node: Node, value: Node) -> Activation | None:
        """The activation of `value`, and of nothing else, that a node computes."""
        if not node.args or node.args[0] is not value:
            return None
        called = self._called(node)
        if called is not None:
            return activation_of(called)
        if node.op not in ("call_function", "call_method") or node.target not in _ACTIVATIONS:
            return None
        name, parameters = _ACTIVATIONS[node.target]
        given = {**dict(zip(parameters, node.args[1:], strict=False)), **node.kwargs}
        given.pop("inplace", None)
        if given.pop("approximate", "none") == "tanh":
            name = "gelu_tanh"
        if any(not isinstance(number, int | float) for number in given.values()) or not given.keys() <= set(parameters):
            return None
        return Activation(name, **given)  # type: ignore[arg-type]

    def _operands(self, node: Any) -> tuple[Node, Node] | None:
        """The two tensors that a node adds; of an add in place, to what nobody else has."""
        is_add = isinstance(node, Node) and node.op in ("call_function", "call_method") and node.target in _ADDS
        if not is_add or len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1 or node.kwargs.keys() - {"alpha"}:
            return None
        x, residual = node.args
        if not (isinstance(x, Node) and isinstance(residual, Node)) or x is residual:
            return None
        if node.target in _ADDS_IN_PLACE and not self._is_made_for(node, x):
            return None
        return x, residual

    def _into(self, node: Node, x: Node) -> str | None:
        """Which of x and the residual an add writes into, if any."""
        if node.target not in _ADDS_IN_PLACE:
            return None
        return "x" if node.args[0] is x else "residual"

    def _is_made_for(self, node: Node, value: Node) -> bool:
        """Whether `value` is a tensor that only `node` sees."""
        if list(value.users) != [node] or value.op == "placeholder":
            return False
        if value.op == "call_module":
            called = self.module.get_submodule(str(value.target))
            if isinstance(called, _MAKING):
                return True
        elif value.op != "call_function" or value.target not in _ADDS:
            return False
        elif value.target not in _ADDS_IN_PLACE:
            return True
        # Perhaps what it was given, by another name.
        given = value.args[0] if len(value.args) > 0 else None
        return isinstance(given, Node) and self._is_made_for(value, given)

    def _added(self, node: Node, value: Node) -> Node | None:
        """What a node adds to `value`."""
        operands = self._operands(node)
        if operands is None or value not in operands:
            return None
        return operands[1] if operands[0] is value else operands[0]

    # --- where it stands -------------------------------------------------------------------------------------------

    def _follow(self, node: Node, passed: list[Node]) -> tuple[Node, Node | None]:
        """The only user of a value, beyond modules that do nothing, which are appended to `passed`; and the value as
        that user has it."""
        while len(node.users) == 1:
            (user,) = node.users
            if not self._is_identity(user):
                return node, user
            passed.append(user)
            node = user
        return node, None

    def _precede(self, node: Any, passed: list[Node]) -> Any:
        """What a value is beyond modules that do nothing and whose result nobody else uses."""
        while isinstance(node, Node) and self._is_identity(node) and len(node.users) == 1:
            passed.insert(0, node)
            node = node.args[0]
        return node

    def _is_used_between(self, value: Node, last: Node, chain: Sequence[Node]) -> bool:
        """Whether somebody has the value before `last`, and might write into it."""
        return any(user < last for user in value.users if user is not last and user not in chain)

    def _is_written_between(self, chain: Sequence[Node], read: Sequence[Any]) -> bool:
        """Whether, between the first and the last of what becomes one call, somebody may write into what it reads."""
        node = chain[0].next
        while node is not chain[-1]:
            if node not in chain:
                if _writes(node, self.module):
                    return True
                if node.op == "call_module" and any(value in node.args for value in read if value is not None):
                    return True
            node = node.next
        return False


def _writes(node: Node, module: nn.Module) -> bool:
    """Whether a node says that it writes into a tensor that it is given."""
    if node.op == "call_module":
        return bool(getattr(module.get_submodule(str(node.target)), "inplace", False))
    if node.target in _WRITING_OPERATORS or node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return (node.op != "get_attr" and name.endswith("_") and not name.endswith("__")) or True in node.args[1:]
