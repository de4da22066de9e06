"""Calls of late, found by comparing tensors in C++: types, dispatch keys, devices, dtypes, whether they require a
gradient, sizes and strides.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import Any

import torch

Tensor = torch.Tensor
Tensors = tuple[Tensor | None, ...]
Call = Callable[..., Any]
Guard = Callable[..., bool]
Decided = tuple[Callable[[Tensors], tuple[Tensor, ...]], Guard, Call]  # picks those that are not None for the guard

MOST_ALIKE = 8  # calls that are told apart by their tensors alone


class Recent:
    """What was decided for tensors, by a key that is quick to tell and then by the tensors themselves: at most so many
    keys, and of each the last few."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._of_key: dict[Any, list[Decided]] = {}

    def __len__(self) -> int:
        return len(self._of_key)

    def find(self, key: Any, tensors: Tensors) -> Call | None:
        """What was decided for tensors like these, None in the same places; TypeError where the key has no hash."""
        for there, guard, call in self._of_key.get(key, ()):
            given = there(tensors)
            # Of a nested tensor's strides a guard asks in vain, which ends the process.
            if True not in map(_is_nested, given) and guard(*given):
                return call
        return None

    def keep(self, key: Any, tensors: Tensors, call: Call) -> None:
        """What was decided; nothing where torch has no guard, or a tensor is there twice, which a guard refuses."""
        there = [id(tensor) for tensor in tensors if tensor is not None]
        if _guards is None or len({*there}) < len(there):
            return
        if key not in self._of_key and len(self) >= self.most:
            self.clear()
        alike = self._of_key.get(key, [])
        self._of_key[key] = [_decided(tensors, call), *alike[: MOST_ALIKE - 1]]

    def clear(self) -> None:
        self._of_key.clear()


def _decided(tensors: Tensors, call: Call) -> Decided:
    there = [place for place, tensor in enumerate(tensors) if tensor is not None]
    pick = itemgetter(*there) if len(there) > 1 else itemgetter(slice(there[0], there[0] + 1))
    return pick, _guard_of(*pick(tensors)), call


def _guard_of(*tensors: Tensor) -> Guard:
    return _guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


_is_nested = attrgetter("is_nested")


def _tells(guards: Any) -> bool:
    """Whether torch's guard, which has no public name, tells tensors apart as it does in torch 2.11 to 2.13."""
    x, y, alike = (torch.empty(shape, dtype=torch.float32, device="cpu") for shape in ((2, 3), (3,), (2, 3)))
    others = [
        alike.double(),
        alike.t().contiguous().t(),
        alike[:1],
        alike.clone().requires_grad_(),
        torch.nn.Parameter(alike, requires_grad=False),
        torch._neg_view(alike),
        alike.to("meta"),
    ]
    try:
        fits = guards(x, y, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        return fits(alike, y) and not any([fits(other, y) for other in others])
    except Exception:
        return False


_guards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)
if not _tells(_guards):
    _guards = None
