"""What a module holds besides parameters, buffers and children: told apart, kept, and put back."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import nn

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_MOST_NESTED = 3  # containers in containers that are looked into


def own_fields(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that not every one has."""
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


class Held:
    """The lists, dicts and sets that a module holds, and what is in them."""

    def __init__(self, module: nn.Module) -> None:
        self._contents = [(container, _items(container)) for container in _containers([*own_fields(module).values()])]

    def put_back(self) -> bool:
        """Whether anything in them was changed; it is no more."""
        changed = [(container, items) for container, items in self._contents if not _are(_items(container), items)]
        for container, items in changed:
            container.clear()
            for item in items:
                if isinstance(container, dict):
                    container[item[0]] = item[1]
                elif isinstance(container, set):
                    container.add(item)
                else:
                    container.append(item)
        return bool(changed)


def _containers(values: Any, depth: int = _MOST_NESTED) -> Iterator[Any]:
    for value in values:
        if type(value) in (list, dict, set):
            yield value
            if depth:
                yield from _containers([*(value.values() if type(value) is dict else value)], depth - 1)


def _items(container: Any) -> list[Any]:
    return list(container.items() if isinstance(container, dict) else container)


def _are(items: list[Any], before: list[Any]) -> bool:
    """Whether these are the same objects; those of a dict are pairs of them."""

    def same(a: Any, b: Any) -> bool:
        return a is b or (type(a) is type(b) is tuple and len(a) == len(b) and all(map(operator.is_, a, b)))

    return len(items) == len(before) and all(map(same, items, before))
