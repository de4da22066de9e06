"""Kernels that are wrong on purpose where asked to be, for whoever is to find it: interpreted or compiled."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_kernel(X_ptr, Y_ptr, elements, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Without its mask the last program reaches beyond both tensors."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (offsets < elements) if MASKED else (offsets >= 0)
    tl.store(Y_ptr + offsets, tl.load(X_ptr + offsets, mask=mask), mask=mask)
