"""What was decided for tensors, kept for others like them: those of late are told by a comparison in C++ (of types,
dispatch keys, devices, dtypes, whether they require a gradient, sizes and strides), others by a key of what matters.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import Any

import torch

Tensor = torch.Tensor
Tensors = tuple[Any, ...]  # tensors, None, or what a caller gave by mistake
Call = Callable[..., Any]
Guard = Callable[..., bool]
Guarded = tuple[Callable[[Tensors], tuple[Tensor, ...]], Guard, Call]  # picks those that are not None for the guard

MOST_ALIKE = 8  # calls that are told apart by their tensors alone


class Decisions:
    """At most so many, all forgotten when there are more; of late, for as many keys that are quick to tell, the last
    few of each."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._by_key: dict[Any, Call] = {}
        self._of_late: dict[Any, list[Guarded]] = {}

    def recall(self, near: Any, tensors: Tensors) -> Call | None:
        """What was decided of late for tensors like these, None in the same places, in calls of which `near`, which is
        quick to tell, is the same; TypeError where it has no hash."""
        for there, guard, call in self._of_late.get(near, ()):
            given = there(tensors)
            # Of a nested tensor's strides a guard asks in vain, which ends the process.
            if True not in map(_is_nested, given) and guard(*given):
                return call
        return None

    def decide(self, near: Any, tensors: Tensors, key: Any, make: Callable[[], Call]) -> Call:
        """What was decided by this key, or is now; to be recalled for tensors like these."""
        call = self._by_key.get(key)
        if call is None:
            call = make()
            if len(self._by_key) >= self.most:
                self.forget()
            self._by_key[key] = call
        self._keep_of_late(near, tensors, call)
        return call

    def forget(self) -> None:
        self._by_key.clear()
        self._of_late.clear()

    def _keep_of_late(self, near: Any, tensors: Tensors, call: Call) -> None:
        """Not where torch has no guard, or a tensor is there twice, which a guard refuses."""
        places = [place for place, tensor in enumerate(tensors) if tensor is not None]
        pick = itemgetter(*places) if len(places) > 1 else itemgetter(slice(places[0], places[0] + 1))
        there = pick(tensors)
        if _guards is None or len({*map(id, there)}) < len(there):
            return
        if near not in self._of_late and len(self._of_late) >= self.most:
            self._of_late.clear()
        alike = self._of_late.get(near, [])
        self._of_late[near] = [(pick, _guard_of(_guards, there), call), *alike[: MOST_ALIKE - 1]]


_is_nested = attrgetter("is_nested")


def _guard_of(guards: Any, tensors: tuple[Tensor, ...]) -> Guard:
    return guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check


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
    with torch.inference_mode():
        others.append(alike.clone())
    try:
        fits = _guard_of(guards, (x, y))
        return fits(alike, y) and not any([fits(other, y) for other in others])
    except Exception:
        return False


_guards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)
if not _tells(_guards):
    _guards = None
