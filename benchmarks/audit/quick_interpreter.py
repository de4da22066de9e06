"""Triton's interpreter without what it does again and again: tests and counts take a fifth to a half less time.

For Triton 3.6 to 3.9. The values that kernels compute stay the same, since only where they are computed from is kept.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
from triton.runtime import interpreter


@contextlib.contextmanager
def quick_interpreter() -> Iterator[None]:
    """Inside, Triton's language is replaced once a launch, and the NumPy type of each type is looked up once."""
    with contextlib.ExitStack() as replaced:
        for name, quick in (("_patch_lang", _once), ("_get_np_dtype", _kept)):
            replaced.enter_context(mock.patch.object(interpreter, name, quick(getattr(interpreter, name))))
        yield


def _once(patch_lang: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Triton puts its interpreter in the place of the language for a launch, and again for each call of one function by
    another, which is half of the time that some kernels take: here only where it is not in place."""
    language = interpreter.tl

    @functools.cache
    def languages(function: Any) -> tuple[Any, ...]:
        """Those that the function sees."""
        return tuple(value for value in function.__globals__.values() if value is language or value is language.core)

    def patch_what_is_not(function: Any) -> Any:
        if any(language.core.is_builtin(seen.load) for seen in languages(function)):
            return patch_lang(function)
        return interpreter._LangPatchScope()  # of which nothing has to be restored

    return patch_what_is_not


def _kept(numpy_dtype: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    """Triton makes a table of its types each time that it asks for the type of one."""
    of_name: dict[str, np.dtype] = {}

    def numpy_dtype_of(dtype: Any) -> np.dtype:
        scalar = dtype.element_ty if isinstance(dtype, interpreter.tl.block_type) else dtype
        found = of_name.get(scalar.name)
        if found is None:
            found = of_name[scalar.name] = numpy_dtype(scalar)
        return found

    return numpy_dtype_of
