"""What a module holds besides parameters, buffers and children, and where the generators are: kept, and put back."""

from __future__ import annotations

import collections
import itertools
import operator
import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
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
    """The attributes that modules have, and what is in the lists, dicts, sets and deques among them."""

    def __init__(self, *modules: nn.Module) -> None:
        self._fields = [(module, own_fields(module)) for module in modules]
        values = [value for _, fields in self._fields for value in fields.values()]
        self._contents = [(container, _items(container)) for container in _containers(values)]

    def put_back(self) -> bool:
        """Whether anything of it was changed; it is no more."""
        changed = [(container, items) for container, items in self._contents if not _are(_items(container), items)]
        written = [(module, fields) for module, fields in self._fields if not same_fields(own_fields(module), fields)]
        for module, fields in written:
            for name in own_fields(module).keys() - fields.keys():
                del module.__dict__[name]
            module.__dict__.update(fields)
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


class Generators:
    """Where the generators of random numbers are."""

    def __init__(self) -> None:
        self.python, self.torch, self.numpy = random.getstate(), torch.get_rng_state(), numpy.random.get_state()

    def put_back(self) -> bool:
        """Whether numbers were drawn; they will be again."""
        now = Generators()
        same_numpy = all(numpy.array_equal(a, b) for a, b in zip(now.numpy, self.numpy, strict=True))
        if now.python == self.python and torch.equal(now.torch, self.torch) and same_numpy:
            return False
        random.setstate(self.python)
        torch.set_rng_state(self.torch)
        numpy.random.set_state(self.numpy)
        return True
