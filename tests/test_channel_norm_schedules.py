"""However groups are divided among tiles, pieces and programs, numbers are right and bits are as promised."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from tests.channel_norm_cases import FUNCTIONS, ChannelCase, make_case, with_layout
from tests.layouts import Layout, channels_last, every_third_row
from tests.norm_cases import DEVICE, assert_same_bits, check, run_fused, same_bits, short, with_exact_sums, with_fields
from tests.tolerances import kernels_are_interpreted

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to schedule")

from benchmarks.audit.watch import watch
from fused_ops import functional as F
from fused_ops.kernels.channel_norm import forward as forward_module
from fused_ops.kernels.channel_norm import group_norm_forward
from fused_ops.kernels.problem import GroupNorm, slope_takes_two_values
from fused_ops.kernels.views import lies_channels_last
from tests.channel_norm_ways import WAYS, Way, in_pieces
from tests.schedules import forget_schedules

pytestmark = [pytest.mark.one_in(8), pytest.mark.usefixtures("triton_backend", "memory_checked")]

Tensor = torch.Tensor

every_way = pytest.mark.parametrize("way", WAYS, indirect=True, ids=lambda way: way.replace(" ", "-"))
either = pytest.mark.parametrize("layout", [torch.clone, channels_last], ids=["contiguous", "channels_last"])


# --- how often kernels are launched --------------------------------------------------------------------------------

FORWARD = {"whole": ["channel_norm_forward"], "pieces": ["channel_moments", "combine_moments", "channel_apply"]}
WHOLE = ["channel_norm_backward"]
PIECES = ["channel_gradient_sums", "combine_gradients", "channel_gradient_apply"]
BACKWARD = {  # of what requires no gradient
    (): {"whole": [*WHOLE, "column_sum"], "pieces": PIECES},
    ("weight", "bias"): {"whole": WHOLE, "pieces": PIECES},
    ("x", "residual"): {"whole": [*WHOLE, "column_sum"], "pieces": PIECES[:2]},
    ("x", "weight", "bias"): {"whole": WHOLE, "pieces": PIECES[:1]},
    ("x", "residual", "weight"): {"whole": [*WHOLE, "column_sum"], "pieces": PIECES[:2]},
}
LAUNCHED = [  # shape, channels_last, how: well on either side of what is held whole
    ((2, 6, 9, 9), False, "whole"),
    ((1, 4, 40, 40), False, "whole"),
    ((1, 2, 32, 640), False, "pieces"),
    ((2, 6, 9, 9), True, "pieces"),
    ((5, 40), False, "whole"),
    ((2, 2200), False, "pieces"),
]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("frozen", BACKWARD, ids=lambda names: "-".join(names) or "none")
@pytest.mark.parametrize(("shape", "last", "how"), LAUNCHED, ids=short)
def test_how_often(shape: tuple[int, ...], last: bool, how: str, frozen: tuple[str, ...], launches: list[str]) -> None:
    case = make_case("group_norm", *shape, groups=2, residual=True, activation="silu", frozen=frozen)
    case = with_layout(case, channels_last) if last else case
    run_fused(case)
    assert [name.removesuffix("_kernel") for name in launches] == FORWARD[how] + BACKWARD[frozen][how]


@pytest.mark.parametrize("shape", [(7, 300), (7, 300, 1, 1)], ids=short)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("function", ["group_norm", "add_group_norm"])
def test_one_group_of_planes_of_one_element_is_a_row(
    function: str, residual: bool, shape: tuple[int, ...], launches: list[str]
) -> None:
    adds = function.startswith("add_")
    case = make_case(function, *shape, groups=1, residual=residual or adds, activation="silu")
    check(with_layout(case, every_third_row) if residual else case)
    assert launches[:2] == ["row_norm_forward_kernel", "row_norm_backward_kernel"]


@pytest.mark.parametrize("groups", [1, 4])
def test_planes_of_one_element_keep_their_strides(groups: int) -> None:
    for strides in ((8, 1, 1, 1), (8, 1, 8, 8)):
        x = torch.empty_strided((3, 8, 1, 1), strides).normal_().to(DEVICE)
        y, total = F.add_group_norm(x, x.clone(), groups)
        assert y.stride() == total.stride() == strides


@pytest.mark.parametrize("frozen", [("x",), ("residual",)], ids="-".join)
@pytest.mark.parametrize("function", FUNCTIONS[2:])
def test_one_gradient_of_a_sum_takes_no_more(function: str, frozen: tuple[str, ...], launches: list[str]) -> None:
    run_fused(make_case(function, 2, 6, 9, 9, groups=3, activation="silu", frozen=(*frozen, "weight", "bias")))
    assert [name.removesuffix("_kernel") for name in launches] == FORWARD["whole"] + WHOLE


@contextlib.contextmanager
def new_schedules() -> Iterator[list[int]]:
    """Grows by one with every kind of call that has not been met inside: what is compiled, is compiled for a kind."""
    forget_schedules()
    counts: list[int] = []
    yield counts
    counts.append(forward_module._schedule.cache_info().misses)


@either
def test_batch_sizes_are_of_one_kind(layout: Layout) -> None:
    with new_schedules() as kinds:
        for samples in (1, 2, 3, 7):
            run_fused(with_layout(make_case("group_norm", samples, 6, 5, 5, groups=3, dy=None), layout))
    assert kinds == [1]


@either
def test_long_planes_are_of_one_kind_for_each_power_of_two(layout: Layout) -> None:
    with new_schedules() as kinds:
        for plane in (1028, 1200, 2044):
            run_fused(with_layout(make_case("group_norm", 1, 4, plane, dy=None), layout))
    assert kinds == [1]


# --- bits ----------------------------------------------------------------------------------------------------------


def everything_forward(case: ChannelCase, samples: slice = slice(None)) -> dict[str, Tensor | None]:
    """y, total, statistics and, for a slope of two values, the mask: all that a forward can write."""
    assert case.activation is None or isinstance(case.activation, str)
    layout = lies_channels_last(tuple(case.x.shape), case.x.stride(), case.groups)
    norm = GroupNorm(case.groups, layout, case.eps, case.adds_first, case.activation)
    out = group_norm_forward(
        case.x[samples],
        None if case.residual is None else case.residual[samples],
        case.weight,
        case.bias,
        norm,
        save_statistics=True,
        save_bits=slope_takes_two_values(norm.activation),
    )
    return out._asdict()


def assert_same_forward(case: ChannelCase, first: int, end: int | None = None) -> None:
    """Samples from `first` to `end`, or the one, have the bits that they have in their batch, in all outputs."""
    part = slice(first, first + 1 if end is None else end)
    batch, fewer = everything_forward(case), everything_forward(case, part)
    for name, tensor in fewer.items():
        of_batch = batch[name]
        if tensor is None or of_batch is None:
            assert tensor is of_batch, name
            continue
        expected = of_batch.reshape(len(case.x), -1)[part]
        assert same_bits(tensor.reshape(expected.shape), expected), name


@every_way
@pytest.mark.parametrize(
    ("function", "activation"),
    [
        ("group_norm", "relu"),
        ("add_instance_norm", "gelu"),
        pytest.param("instance_norm", None, marks=pytest.mark.full),
    ],
)
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(function: str, activation: str | None, way: Way) -> None:
    case = way.case(function, dtype=torch.float16, samples=3, residual=True, activation=activation)
    assert_same_forward(case, 2)


AS_CONFIGURED = [  # layout, shape, groups: several samples a tile, several pieces a plane, several blocks of channels
    (torch.clone, (5, 3, 4), 3),
    (torch.clone, (2, 1, 30_000), 1),
    pytest.param(torch.clone, (2, 2, 9000), 1, marks=pytest.mark.full),
    (channels_last, (5, 3, 4), 3),
    (channels_last, (2, 40, 9, 60), 4),
    pytest.param(channels_last, (2, 2, 9000), 1, marks=pytest.mark.full),
]


@pytest.mark.parametrize(
    ("layout", "shape", "groups"), AS_CONFIGURED, ids=lambda value: getattr(value, "__name__", short(value))
)
def test_a_sample_alone_has_the_bits_it_has_in_a_batch_as_configured(
    layout: Layout, shape: tuple[int, ...], groups: int
) -> None:
    case = make_case("group_norm", *shape, groups=groups, dtype=torch.bfloat16, residual=True, activation="relu")
    assert_same_forward(with_layout(case, layout), 1)


@pytest.mark.parametrize("function", ["group_norm", "add_instance_norm"])
def test_samples_with_gaps_between_have_the_same_bits_in_any_batch(function: str) -> None:
    """But for one alone, which counts as one of a batch without gaps: these move as one run."""
    case = make_case(function, 4, 12, 7, 6, groups=4, dtype=torch.float16, activation="gelu")
    assert_same_forward(with_layout(case, every_third_row), 1, 3)


@every_way
def test_the_same_call_has_the_same_bits_whatever_the_order_of_programs(way: Way) -> None:
    if not kernels_are_interpreted():
        pytest.skip("a GPU orders programs as it likes")
    case = way.case("group_norm", dtype=torch.float16, residual=True, activation="relu")
    in_order = run_fused(case)
    assert_same_bits(run_fused(case), in_order)
    with watch(shuffle=1):
        assert_same_bits(run_fused(case), in_order)


@pytest.mark.parametrize("way", ["whole", "ragged"], indirect=True)
def test_dx_of_a_whole_group_alone_has_the_bits_it_has_in_a_batch(way: Way) -> None:
    case = way.case("group_norm", samples=3, activation="gelu")
    batch = run_fused(case).gradients["dx"]
    alone = run_fused(with_fields(case, x=case.x[2:], dy=case.dy[2:])).gradients["dx"]
    assert same_bits(alone, batch[2:])


# --- divisions -----------------------------------------------------------------------------------------------------

# Channels and positions of a tile, tiles of a piece forward and backward, for 12 channels of 77 positions: blocks that
# divide them or leave a rest, one piece or many, the last of which has fewer tiles.
PLAIN_DIVISIONS = [(4, 8, 1, 1), (8, 16, 3, 2), (1, 32, 2, 1), (16, 64, 1, 2), (2, 128, 1, 1)]
LAST_DIVISIONS = [(8, 8, 4, 1), (8, 16, 3, 2), (16, 8, 3, 5), (8, 128, 1, 1)]
DIVISIONS = [
    pytest.param(
        layout, *division, marks=[] if index == 1 else pytest.mark.full, id=short((layout.__name__, *division))
    )
    for layout, divisions in ((torch.clone, PLAIN_DIVISIONS), (channels_last, LAST_DIVISIONS))
    for index, division in enumerate(divisions)
]


@pytest.mark.parametrize(("layout", "channels", "positions", "steps", "backward_steps"), DIVISIONS)
@pytest.mark.parametrize(
    ("function", "residual", "activation"),
    [
        ("group_norm", True, "relu"),
        ("add_group_norm", True, "silu"),
        pytest.param("group_norm", True, "silu", marks=pytest.mark.full),
        pytest.param("instance_norm", False, None, marks=pytest.mark.full),
    ],
)
def test_every_division_is_right(
    function: str, residual: bool, activation: str | None,
    layout: Layout, channels: int, positions: int, steps: int, backward_steps: int,
) -> None:  # fmt: skip
    case = make_case(function, 2, 12, 7, 11, groups=4, dtype=torch.float16, residual=residual, activation=activation)
    with in_pieces(channels, positions, steps, backward_steps):
        check(with_layout(with_exact_sums(case), layout))
