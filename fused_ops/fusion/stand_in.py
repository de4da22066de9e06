"""What stands for a tensor while a forward is traced: a proxy that answers nothing wrongly, and says so by raising."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.fx import Proxy
from torch.fx.proxy import Attribute

from .in_place import IN_PLACE

_INSIDE = ("torch", __name__, f"{__package__}.tracing")  # who may ask anything
_NOT_OF_A_MODEL = frozenset({"torch", "fused_ops", *sys.stdlib_module_names})
_ASKING_FOR_A_MODE = {"is_autocast_enabled", "is_autocast_cpu_enabled", "is_inference_mode_enabled"}


class CallsOfC:
    """Which function in C each frame is calling: only so much tells who asks for a class."""

    def __init__(self, refuse: Callable[[str], Exception]) -> None:
        self._now: dict[FrameType, Any] = {}
        self._refuse = refuse

    def of(self, frame: FrameType) -> Any:
        """None where it calls nothing, or what tells nobody of its calls, as a class does not."""
        return self._now.get(frame)

    def __enter__(self) -> CallsOfC:
        self._before = sys.getprofile()
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)

    def _note(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call":
            self._now[frame] = function
            name = getattr(function, "__name__", "")
            if _root(frame) in _NOT_OF_A_MODEL:
                return
            if name in _ASKING_FOR_A_MODE:
                self._refuse("its forward goes by the mode of autograd or autocast")
            elif function is callable:  # as every proxy is
                self._refuse("its forward goes by whether something can be called")
        elif event in ("c_return", "c_exception"):
            self._now.pop(frame, None)


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
        frame = sys._getframe(1)
        by_is_tensor = frame.f_code is torch.is_tensor.__code__
        if not by_is_tensor and (_is_within(frame, *_INSIDE) or self._is_read_in_c(frame)):
            return StandIn
        of_class = object.__getattribute__(self, "of_class")
        if of_class is None:
            raise self.tracer.refuse("its forward goes by the class of what it computes")
        return of_class

    def _is_read_in_c(self, frame: FrameType) -> bool:
        """Whether a function of torch's in C asks: told a class that is not there, it would read what is not there.
        Untraceable where one of Python's own asks, but isinstance: nobody can tell what for."""
        operation = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        if "CALL" not in operation:
            return operation not in ("LOAD_ATTR", "LOAD_METHOD", "MATCH_CLASS")
        function = self.tracer.calls.of(frame)
        if function is isinstance:
            return False
        if function is None or getattr(function, "__module__", None) == "builtins":
            raise self.tracer.refuse("its forward goes by the class of what it computes")
        return True

    def __getattr__(self, k: str) -> Any:
        if k in _OF_AUTOGRAD:
            raise self.tracer.refuse(f"its forward goes by {k} of a tensor")
        if self.tracer.calls.of(sys._getframe(1)) in (hasattr, getattr):
            of_class = object.__getattribute__(self, "of_class")
            if of_class is None or not hasattr(of_class, k):
                raise self.tracer.refuse(f"its forward goes by whether there is a {k}")
        return super().__getattr__(k)


def _in_place(operation: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", operation, (self, other), {})


for _name, _operation in IN_PLACE.items():
    setattr(_Watched, f"__{_name}__", _in_place(_operation))


def asked_by(*names: str, levels: int = 2) -> bool:
    """Whether the code that many levels up is in one of these packages or modules."""
    return _is_within(sys._getframe(levels), *names)


def _is_within(frame: FrameType, *names: str) -> bool:
    return frame.f_globals.get("__name__", "") in names or _root(frame) in names


def _root(frame: FrameType) -> str:
    """The package that a frame's code is of."""
    root: str = frame.f_globals.get("__name__", "").partition(".")[0]
    return root
