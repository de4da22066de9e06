"""Compiled kernels run without a GPU: the PTX that Triton made for it, executed by NumPy on CPU tensors."""

from .driver import emulating
from .findings import Finding
from .ptx import UnknownInstruction

__all__ = ["Finding", "UnknownInstruction", "emulating"]
