"""The sum of partial gradients, and the configurations that divide a row."""

from __future__ import annotations

import pytest
import torch

from tests.norm_cases import normal, short
from tests.tolerances import assert_within_budget, rounding

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to schedule")

import fused_ops.kernels.column_sum as column_sum_module
from fused_ops.kernels import launch

pytestmark = pytest.mark.usefixtures("triton_backend", "memory_checked")

Tensor = torch.Tensor

# --- the sum of partial gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["both", "dweight", "dbias"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (63, 17), (64, 5), (65, 33), (200, 48), (130, 2049)], ids=short)
def test_column_sum(shape: tuple[int, int], given: str) -> None:
    names = ("dweight", "dbias")
    partials = [normal(*shape, seed=len(name)) if given in ("both", name) else None for name in names]
    sums = column_sum_module.column_sum(*partials, torch.float32, torch.float32)
    for name, partial, actual in zip(names, partials, sums, strict=True):
        if partial is None:
            assert actual is None
            continue
        exact = partial.double().sum(0).cpu()
        # Each of these additions rounds once, and no running sum is larger than the sum of magnitudes.
        allowed = shape[0] * rounding(torch.float32) * partial.double().abs().sum(0).cpu()
        assert actual.shape == shape[1:]
        assert bool(((actual.double().cpu() - exact).abs() <= allowed).all()), name


def test_column_sum_rounds_to_the_types_of_the_parameters() -> None:
    partials = normal(70, 20), normal(70, 20, seed=1)
    sums = column_sum_module.column_sum(*partials, torch.float16, torch.float64)
    assert [total.dtype for total in sums] == [torch.float16, torch.float64]
    for partial, actual in zip(partials, sums, strict=True):
        rounded = partial.sum(0).to(actual.dtype)
        of_sum = actual.float() if actual.dtype == torch.float64 else actual  # whose terms are added up in float32
        assert_within_budget("column sum", of_sum, rounded, partial.double().sum(0).cpu(), terms=70)


# --- configurations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("direction", ["forward", "forward, residual added", "backward"])
def test_chunks_cover_every_row_and_none_is_empty(direction: str, itemsize: int) -> None:
    def config(span: int, itemsize: int) -> launch.ChunkConfig:
        if direction == "backward":
            return launch.backward_chunk_config(span, itemsize)
        return launch.chunk_config(span, itemsize, 2 * itemsize if "residual" in direction else itemsize)

    beside_powers = [2**k + beside for k in range(10, 29) for beside in (-1, 0, 1)]
    for span in [*beside_powers, 200_000, 3 * 2**20 + 5]:
        chunks = config(span, itemsize)
        length = chunks.block_span * chunks.steps
        assert (chunks.chunks - 1) * length < span <= chunks.chunks * length, span
        assert 1 <= chunks.chunks <= launch.MOST_CHUNKS, span
        assert chunks.block_span.bit_count() == 1, span
