"""What a module holds besides parameters, buffers and children: told apart, kept, and put back."""

from __future__ import annotations

import collections
import itertools
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_REGISTERED = ("_parameters", "_buffers", "_modules", *(name for name in _OF_EVERY_MODULE if "hooks" in name))
_CONTAINERS = (list, dict, set, collections.deque)
_MOST_CONTAINERS = 256  # of a module that are looked into, those in others among them


def own_fields(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that not every one has."""
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


def registered(module: nn.Module) -> Any:
    """The names of a module's parameters, buffers, children and hooks."""
    return [tuple(found) for name in _REGISTERED if (found := vars(module).get(name)) is not None]


class Held:
    """The lists, dicts, sets and deques that modules hold, what is in them, and what attributes others have."""

    def __init__(self, *modules: nn.Module, others: Iterable[nn.Module] = ()) -> None:
        self._others = [(other, own_fields(other)) for other in others]
        fields = [*map(own_fields, modules), *(fields for _, fields in self._others)]
        values = [value for each in fields for value in each.values()]
        self._contents = [(container, _items(container)) for container in _containers(values)]

    def put_back(self) -> bool:
        """Whether anything of it was changed; it is no more."""
        changed = [(container, items) for container, items in self._contents if not _are(_items(container), items)]
        written = [(other, fields) for other, fields in self._others if not same_fields(own_fields(other), fields)]
        for other, fields in written:
            put_fields_back(other, fields)
        for container, items in changed:
            container.clear()
            if isinstance(container, dict):
                half = len(items) // 2
                container.update(zip(items[:half], items[half:], strict=True))
            elif isinstance(container, set):
                container.update(items)
            else:
                container.extend(items)
        return bool(changed or written)


def same_fields(fields: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether these attributes are the same objects."""
    return fields.keys() == before.keys() and all(fields[name] is before[name] for name in fields)


def put_fields_back(module: nn.Module, fields: Mapping[str, Any]) -> None:
    """Gives a module the attributes that it had."""
    for name in own_fields(module).keys() - fields.keys():
        del module.__dict__[name]
    module.__dict__.update(fields)


def _containers(values: list[Any]) -> list[Any]:
    found = [value for value in values if isinstance(value, _CONTAINERS)]
    for container in found:  # which grows
        if len(found) < _MOST_CONTAINERS:
            inner = container.values() if isinstance(container, dict) else container
            nested = (value for value in inner if isinstance(value, _CONTAINERS))
            found.extend(itertools.islice(nested, _MOST_CONTAINERS - len(found)))
    return found


def _items(container: Any) -> list[Any]:
    """What is in it; of a dict keys, then values."""
    return [*container, *container.values()] if isinstance(container, dict) else [*container]


def _are(items: list[Any], before: list[Any]) -> bool:
    """Whether these are the same objects."""
    return len(items) == len(before) and all(map(operator.is_, items, before))
