"""Children that end in a norm, put into the graph of a forward that goes on from there.

A forward's graph has its children as single nodes. Where one is a chain that ends in a norm, and its parent adds to the
result or activates it (the convolution and norm of one class, the block's add in another), the child's own graph takes
its node's place, so that the norm and what follows stand side by side.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from torch.fx import Graph, Node

from .sites import NormSite, Replaced, has_hooks, path_of, submodule
from .tracing import Given, Traced, Untraceable, given_by_default, is_still, trace_whatever_grad

OF_A_PART = "of a part"  # in the meta of nodes that were a child's


class Inlined(NamedTuple):
    """A child whose forward stands in another's graph, and what has to hold of it in a call; norm: the one that it
    ends in."""

    name: str
    norm: str
    cls: type[nn.Module]
    attributes: dict[str, Any]
    children: tuple[str, ...]

    def holds(self, module: nn.Module) -> bool:
        """Whether the child of a module is still what it was, and nobody listens to its calls."""
        child = submodule(module, path_of(self.name))
        return (
            child is not None
            and class_before(child) is self.cls
            and is_called_plainly(child)
            and not has_hooks(child)
            and tuple(child._modules) == self.children
            and all(is_still(getattr(child, name, ...), value) for name, value in self.attributes.items())
        )


def class_before(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was fused."""
    return module._class_before if isinstance(module, Replaced) else type(module)


def is_called_plainly(module: nn.Module) -> bool:
    """Whether a call of the module is a call of its forward, as far as `has_hooks` does not tell."""
    return type(module).__call__ is nn.Module.__call__ and getattr(module, "_compiled_call_impl", None) is None


def inline(graph: Graph, module: nn.Module, chosen: frozenset[str] | None = None) -> list[Inlined]:
    """Puts children that end in a norm into the graph of the module's forward: all, or those with a chosen name."""
    found: list[Inlined] = []
    nodes = list(graph.nodes)
    while nodes:
        node = nodes.pop()
        if node.op != "call_module" or (chosen is not None and node.target not in chosen):
            continue
        traced = _ending_in_a_norm(node, module)
        if traced is not None:
            name = str(node.target)
            child = module.get_submodule(name)
            norm = f"{name}.{_norm_at_the_end(traced.graph, child)}"
            found.append(Inlined(name, norm, class_before(child), dict(traced.attributes), tuple(child._modules)))
            nodes.append(_put(traced.graph, graph, node))
    return found


def _ending_in_a_norm(node: Node, module: nn.Module) -> Traced | None:
    """The forward of the module that a node calls with one tensor, if its result is one of a norm."""
    child = module.get_submodule(str(node.target))
    if isinstance(child, Replaced) or not child._modules or len(node.args) != 1 or node.kwargs or has_hooks(child):
        return None
    if type(child).__module__.startswith("torch.") and type(child) is not nn.Sequential:
        return None
    if not is_called_plainly(child) or not isinstance(node.args[0], Node):
        return None
    try:
        names = ("input",) if type(child) is nn.Sequential else tuple(given_by_default(child))
        given = dict.fromkeys(names, Given(object))
        traced = trace_whatever_grad(child, given)
    except (Untraceable, TypeError, ValueError):
        return None
    if len(names) != 1 or "training" in traced.attributes:
        return None
    return traced if _norm_at_the_end(traced.graph, child) else None


def _norm_at_the_end(graph: Graph, module: nn.Module) -> str:
    """The name of the norm whose result a graph returns, or nothing."""
    result = _result(graph)
    while isinstance(result, Node) and result.op == "call_module":
        called = module.get_submodule(str(result.target))
        if isinstance(called, NormSite):
            return str(result.target)
        if type(called) is not nn.Identity:
            traced = _ending_in_a_norm(result, module)
            return "" if traced is None else f"{result.target}.{_norm_at_the_end(traced.graph, called)}"
        if len(result.args) != 1:
            return ""
        result = result.args[0]
    return ""


def _result(graph: Graph) -> Any:
    (result,) = next(node for node in graph.nodes if node.op == "output").args
    return result


def _put(inner: Graph, graph: Graph, node: Node) -> Node:
    """Puts a graph into another in the place of a node, and returns what its result is there."""
    values: dict[Node, Any] = {}
    with graph.inserting_before(node):
        for part in inner.nodes:
            if part.op == "placeholder":
                values[part] = node.args[0]
            elif part.op != "output":
                copy = values[part] = graph.node_copy(part, values.__getitem__)
                copy.meta[OF_A_PART] = True
                if part.op in ("call_module", "get_attr"):
                    copy.target = f"{node.target}.{part.target}"
    result: Node = values[_result(inner)]
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return result
