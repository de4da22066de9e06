"""What stands for a tensor while a forward is traced: a proxy that answers nothing wrongly, and says so by raising."""

from __future__ import annotations

import dis
import sys
from types import FrameType
from typing import Any

import torch
from torch.fx import Proxy
from torch.fx.proxy import Attribute

from .in_place import IN_PLACE

_INSIDE = ("torch", __name__, f"{__package__}.tracing")  # who may ask anything


class _Text(str):
    """The text of what a proxy stands for, which may be a part of a message, but not what a forward goes by."""

    refuse: Any

    def _told(self, *_: Any) -> Any:
        raise str.__getattribute__(self, "refuse")("its forward goes by the text of what it computes")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _told
    __hash__ = __contains__ = __getitem__ = __iter__ = __len__ = _told

    def __getattribute__(self, name: str) -> Any:
        return self._told() if hasattr(str, name) and not name.startswith("_") else super().__getattribute__(name)


class _Watched(Proxy):
    """A proxy that lets nobody ask what it cannot tell: its hash, its number, or to set an attribute of it."""

    tracer: Any

    def _told(self, *_: Any) -> Any:
        raise self.tracer.refuse("its forward goes by the hash or the number of what it computes")

    __float__ = __int__ = __complex__ = __index__ = __len__ = __contains__ = _told

    def __hash__(self) -> int:
        return id(self) if asked_by(*_INSIDE) else self._told()

    def __repr__(self, *_: Any) -> str:
        text = _Text(super().__repr__())
        if asked_by(*_INSIDE):
            return str.__str__(text)
        text.refuse = self.tracer.refuse
        return text

    __str__ = __format__ = __repr__

    def __getattr__(self, k: str) -> Any:
        return _WatchedAttribute(self, k)

    def __setattr__(self, name: str, value: Any) -> None:
        if not asked_by(*_INSIDE):
            raise self.tracer.refuse(f"its forward sets {name} of a tensor")
        super().__setattr__(name, value)


class _WatchedAttribute(_Watched, Attribute):
    """An attribute of what a proxy stands for."""


_OF_AUTOGRAD = ("grad", "grad_fn", "_base", "_grad", "_grad_fn")


class StandIn(_Watched):
    """A proxy that says of which class its value is, where that is known of an argument, and else lets nobody ask."""

    def __init__(self, node: Any, tracer: Any, of_class: type | None) -> None:
        super().__init__(node, tracer)
        self.of_class = of_class

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        asking = sys._getframe(1)
        if asking.f_code is not torch.is_tensor.__code__ and (asked_by(*_INSIDE) or not _asks_for_a_class(asking)):
            return StandIn
        of_class = object.__getattribute__(self, "of_class")
        if of_class is None:
            raise self.tracer.refuse("its forward goes by the class of what it computes")
        return of_class

    def __getattr__(self, k: str) -> Any:
        if k in _OF_AUTOGRAD:
            raise self.tracer.refuse(f"its forward goes by {k} of a tensor")
        if self.of_class is torch.Tensor and not hasattr(torch.Tensor, k):
            raise AttributeError(f"'Tensor' object has no attribute '{k}'")
        return super().__getattr__(k)


def _asks_for_a_class(frame: FrameType) -> bool:
    """Whether it is code in Python that wants to know one: isinstance, a match statement, x.__class__. A function in C
    that is told one which is not there would read what is not there."""
    code = frame.f_code
    instructions = list(dis.get_instructions(code))
    now = next(each for each in instructions if each.offset == frame.f_lasti)
    if "CALL" not in now.opname:
        return now.opname in ("LOAD_ATTR", "LOAD_METHOD", "MATCH_CLASS")
    of_it = [each for each in instructions if each.argval == "isinstance"]
    return _begins(now) in map(_begins, of_it)


def _begins(instruction: dis.Instruction) -> Any:
    """Where the code of an instruction begins, of which Python 3.10 knows nothing."""
    positions: Any = getattr(instruction, "positions", None)
    return None if positions is None else positions[::2]


def _in_place(operation: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", operation, (self, other), {})


for _name, _operation in IN_PLACE.items():
    setattr(_Watched, f"__{_name}__", _in_place(_operation))


def asked_by(*names: str, levels: int = 2) -> bool:
    """Whether the code that many levels up is in one of these packages or modules."""
    name = sys._getframe(levels).f_globals.get("__name__", "")
    return name in names or name.partition(".")[0] in names
