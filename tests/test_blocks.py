"""The blocks and the ResNets made of them: the same as torch.nn's, in fewer launches."""

from __future__ import annotations

import copy
import doctest
import importlib
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fused_ops
from fused_ops import blocks
from fused_ops.blocks import norms
from tests import block_twins as twins
from tests.block_twins import NORMS, assert_equal_to_twin, drawn, inputs
from tests.norm_cases import DEVICE

each_norm = pytest.mark.parametrize("norm", NORMS)
each_block = pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck", "PreActivationBlock"])
each_version_one = pytest.mark.parametrize("name", ["BasicBlock", "Bottleneck"])
SIZES = {"keeps its shape": (8, 8, 1), "changes it": (4, 8, 2)}
each_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def pair(name: str, *args: Any, **keywords: Any) -> tuple[nn.Module, nn.Module]:
    return drawn(getattr(blocks, name)(*args, **keywords)), getattr(twins, name)(*args, **keywords)


def images(name: str, channels: int) -> tuple[torch.Tensor, ...]:
    """As many as the block takes."""
    count = 2 if name == "PreActivationBlock" else 1
    return inputs(*[(2, channels, 4, 4)] * count)


# --- blocks of residual networks -----------------------------------------------------------------------------------


@pytest.mark.one_in(3)
@each_block
@each_norm
@each_size
def test_a_block_is_its_twin(name, norm, sizes, each_backend):
    assert_equal_to_twin(*pair(name, *sizes, norm=norm), *images(name, sizes[0]))


@pytest.mark.one_in(3)
@each_version_one
@each_size
def test_a_plain_block_is_its_twin(name, sizes, each_backend):
    ours, twin = pair(name, *sizes, residual=False)
    assert ours.shortcut is None
    assert_equal_to_twin(ours, twin, *images(name, sizes[0]))


@pytest.mark.one_in(3)
@each_block
@each_size
def test_convolutions_may_be_standardized(name, sizes, each_backend):
    ours, twin = pair(name, *sizes, norm="group", weight_standardization=True)
    convolutions = [module for module in ours.modules() if isinstance(module, nn.Conv2d)]
    assert convolutions and all(type(module) is fused_ops.WSConv2d for module in convolutions)
    assert_equal_to_twin(ours, twin, *images(name, sizes[0]))


@pytest.mark.one_in(3)
@each_block
@pytest.mark.parametrize("norm", ["batch", "switch"])
def test_running_statistics_are_used_in_evaluation(name, norm, each_backend):
    ours, twin = pair(name, 4, 8, 2, norm=norm)
    assert_equal_to_twin(ours.eval(), twin, *images(name, 4))


@each_block
def test_a_block_has_any_activation(name, each_backend):
    ours, twin = drawn(getattr(blocks, name)(8, 8, activation="silu")), getattr(twins, name)(8, 8)
    twin.activation = nn.functional.silu
    assert_equal_to_twin(ours, twin, *images(name, 8))


@pytest.mark.one_in(3)
@each_block
@pytest.mark.parametrize("norm", ["batch", "layer", "rms"])
def test_types_may_differ_under_autocast(name, norm, each_backend):
    """A convolution's output is half there, and the float32 of what comes beside it stays."""
    block = getattr(blocks, name)(4, 4, norm=norm).to(DEVICE)
    found = []
    for cast in (True, False):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=cast):
            out = block(*(tensor.float() for tensor in images(name, 4)))
            found.append(out[1] if isinstance(out, tuple) else out)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05)  # bfloat16 has three digits


def test_each_sum_of_a_pre_activation_block_is_in_one_launch_with_the_norm_behind_it(launches, triton_backend):
    """Small channels fit on chip: a launch a norm, two norms a block, and none for the sum."""
    y = total = inputs((2, 4, 4, 4))[0]
    for block in (blocks.PreActivationBlock(4, 4), blocks.PreActivationBlock(4, 8, 2)):
        y, total = block.double().to(DEVICE)(y, total)
    assert launches == ["batch_norm_forward_kernel"] * 4


def test_the_identity_path_is_untouched(each_backend):
    block = blocks.PreActivationBlock(4, 4).double().to(DEVICE)
    nn.init.zeros_(block.conv2.weight)
    y, stream = inputs((2, 4, 4, 4), (2, 4, 4, 4))
    assert torch.equal(block(y, stream)[1], stream)


# --- ResNets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["batch", pytest.param("group", marks=pytest.mark.full)])
def test_resnet56_of_version_2_is_its_twin(norm, each_backend):
    ours = drawn(blocks.resnet56(norm, version=2, width=4))
    assert_equal_to_twin(ours, twins.ResNet(9, norm, 2, True, 4), *inputs((2, 3, 8, 8)))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("residual", [True, False])
def test_a_resnet_is_its_twin(version, residual, each_backend):
    ours = drawn(blocks.resnet20("batch", version, residual, width=4))
    assert_equal_to_twin(ours, twins.ResNet(3, "batch", version, residual, 4), *inputs((2, 3, 8, 8)))


def test_layers_are_counted_as_the_paper_counts_them():
    """Convolutions but those of shortcuts, and the linear layer. ResNet-20 has 0.27 million parameters there."""
    layers = {18: blocks.resnet18, 20: blocks.resnet20, 56: blocks.resnet56, 110: blocks.resnet110}
    for count, build in layers.items():
        with torch.device("meta"):
            model = build()
        convolutions = [key for key, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        assert sum("shortcut" not in key for key in convolutions) + 1 == count
        assert model.head.in_features == (16 << 3 if count == 18 else 16 << 2)
    parameters = sum(parameter.numel() for parameter in blocks.resnet20(residual=False).parameters())
    assert round(parameters / 1e6, 2) == 0.27


def test_both_versions_have_the_same_parameters_but_for_the_norms_of_projections():
    states = {
        (version, residual): blocks.resnet20(version=version, residual=residual).state_dict()
        for version in (1, 2)
        for residual in (True, False)
    }
    plain = states[1, False].keys()
    assert plain == states[2, False].keys()
    projections = {f"blocks.{index}.shortcut.weight" for index in (3, 6)}
    assert states[2, True].keys() - plain == projections
    assert {key for key in states[1, True].keys() - plain if "shortcut.0" in key} == {
        key.replace("weight", "0.weight") for key in projections
    }
    assert plain < states[1, True].keys()


def test_convolutions_begin_as_in_torchvision():
    torch.manual_seed(0)
    weight = blocks.BasicBlock(64, 64).conv1.weight
    assert weight.mean().abs() < 1e-3
    torch.testing.assert_close(weight.std(), torch.tensor((2 / (9 * 64)) ** 0.5), rtol=0.02, atol=0)


@pytest.mark.parametrize("version", [1, 2])
def test_images_may_have_any_number_of_channels_and_any_layout(version, each_backend):
    model = drawn(blocks.ResNet((1, 1), version=version, width=4, num_classes=3, in_channels=1)).eval()
    (x,) = inputs((2, 1, 8, 8))
    y = model(x)
    assert y.shape == (2, 3)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), y)


# --- Transformers --------------------------------------------------------------------------------------------------


def encoder(depth: int, *args: Any, **keywords: Any) -> nn.Sequential:
    return nn.Sequential(*(twins.EncoderLayer(*args, **keywords) for _ in range(depth)))


@each_norm
def test_a_transformer_block_is_its_twin(norm, each_backend):
    ours, twin = drawn(blocks.TransformerBlock(8, 2, norm=norm)), twins.EncoderLayer(8, 2, norm)
    assert_equal_to_twin(ours, twin, *inputs((2, 3, 8)), name=twins.torchs_name)


@pytest.mark.one_in(3)
@each_norm
def test_a_transformer_block_with_layer_scale_is_its_twin(norm, each_backend):
    ours = drawn(blocks.TransformerBlock(8, 2, norm=norm, layer_scale=0.5))
    twin = twins.EncoderLayer(8, 2, norm, layer_scale=0.5)
    assert_equal_to_twin(ours, twin, *inputs((2, 3, 8)), name=twins.torchs_name)


@pytest.mark.parametrize("norm", ["layer", pytest.param("rms", marks=pytest.mark.full)])
def test_24_transformer_blocks_are_their_twins(norm, each_backend):
    ours = drawn(nn.Sequential(*(blocks.TransformerBlock(8, 2, norm=norm) for _ in range(24))))
    assert_equal_to_twin(ours, encoder(24, 8, 2, norm), *inputs((2, 3, 8)), name=twins.torchs_name)


class Stack(nn.ModuleList):
    """Blocks that add what is before them, and a plain sum of the last two tensors."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        for block in self:
            x, residual = block(x, residual)
        return x + residual


@pytest.mark.one_in(3)
@each_norm
def test_blocks_that_add_first_are_the_same_stack(norm, each_backend):
    ours = drawn(Stack(blocks.AddTransformerBlock(8, 2, norm=norm) for _ in range(3)))
    theirs = nn.Sequential(*(blocks.TransformerBlock(8, 2, norm=norm) for _ in range(3))).double().to(DEVICE)
    theirs.load_state_dict(ours.state_dict())
    x, residual = inputs((2, 3, 8), (2, 3, 8))
    torch.testing.assert_close(ours(x, residual), theirs(x + residual))


def test_each_sum_in_a_stack_is_in_one_launch_with_the_norm_behind_it(launches, triton_backend):
    x, residual = inputs((2, 3, 8), (2, 3, 8))
    blocks.TransformerBlock(8, 2).double().to(DEVICE)(x)
    assert launches == ["row_norm_forward_kernel"] * 2 + ["residual_add_forward_kernel"]
    launches.clear()
    Stack(blocks.AddTransformerBlock(8, 2) for _ in range(2)).double().to(DEVICE)(x, residual)
    assert launches == ["row_norm_forward_kernel"] * 4


@pytest.mark.parametrize("layer_scale", [None, 0.5])
@pytest.mark.parametrize("rate", ["dropout_p", "drop_path_p"])
def test_what_drops_a_whole_branch_leaves_the_stream(layer_scale, rate, each_backend):
    block = drawn(blocks.TransformerBlock(8, 2, layer_scale=layer_scale, **{rate: 1.0}))
    (x,) = inputs((2, 3, 8))
    assert torch.equal(block(x), x)
    kept = drawn(blocks.TransformerBlock(8, 2, layer_scale=layer_scale)).eval()
    kept.load_state_dict(block.state_dict())
    torch.testing.assert_close(block.eval()(x), kept(x))


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_what_is_added_first_is_dropped_out(norm, each_backend):
    x, residual = inputs((2, 3, 8), (2, 3, 8))
    block = drawn(blocks.AddTransformerBlock(8, 2, norm=norm, dropout_p=1.0))
    assert torch.equal(block(x, residual)[1], residual)
    assert not torch.equal(block.eval()(x, residual)[1], residual)


@pytest.mark.parametrize("keywords", [{}, {"layer_scale": 0.5}])
def test_a_transformer_block_works_under_autocast(keywords, each_backend):
    block = blocks.TransformerBlock(8, 2, **keywords).to(DEVICE)
    x = inputs((2, 3, 8))[0].float()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, block(x), rtol=0.05, atol=0.05)


# --- as modules ----------------------------------------------------------------------------------------------------

MADE = {
    "BasicBlock": lambda norm: blocks.BasicBlock(4, 8, 2, norm=norm),
    "Bottleneck": lambda norm: blocks.Bottleneck(4, 8, 2, norm=norm),
    "PreActivationBlock": lambda norm: blocks.PreActivationBlock(4, 8, 2, norm=norm),
    "TransformerBlock": lambda norm: blocks.TransformerBlock(4, 2, norm=norm, layer_scale=0.1),
    "AddTransformerBlock": lambda norm: blocks.AddTransformerBlock(4, 2, norm=norm),
}


def called(name: str, block: nn.Module) -> torch.Tensor:
    tensors = inputs((2, 3, 4), (2, 3, 4)) if "Transformer" in name else inputs(*[(2, 4, 4, 4)] * 2)
    out = block.eval()(*tensors[: 2 if name in ("PreActivationBlock", "AddTransformerBlock") else 1])
    return torch.cat([tensor.flatten() for tensor in (out if isinstance(out, tuple) else (out,))])


@pytest.mark.one_in(5)
@each_norm
@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_equal_and_independent(norm, name, duplicate):
    block = drawn(MADE[name](norm))
    twin, before = duplicate(block), called(name, block)
    assert repr(twin) == repr(block)
    assert torch.equal(called(name, twin), before)
    drawn(twin, seed=1)
    assert torch.equal(called(name, block), before) and not torch.equal(called(name, twin), before)
    block.load_state_dict(twin.state_dict())
    assert torch.equal(called(name, block), called(name, twin))


def test_batch_norms_of_a_block_can_be_synchronized():
    """The norm of a sequence's channels too, which is given a view of it."""
    for name in ("PreActivationBlock", "TransformerBlock"):
        block = drawn(MADE[name]("batch"))
        expected = called(name, block)
        converted = fused_ops.convert_sync_batchnorm(block)
        assert sum(isinstance(module, nn.SyncBatchNorm) for module in converted.modules()) == 2
        assert torch.equal(called(name, converted), expected)


@pytest.mark.parametrize("name", MADE)
def test_an_unknown_norm_is_named_beside_the_known_ones(name):
    with pytest.raises(ValueError, match=r"norm must be one of batch, layer, .*switch, but is 'power'"):
        MADE[name]("power")


def test_what_does_not_fit_is_refused_with_its_value():
    with pytest.raises(ValueError, match="out_channels must be a multiple of 4, but is 6"):
        blocks.Bottleneck(4, 6)
    with pytest.raises(ValueError, match=r"version must be 1 \(BasicBlock\) or 2 \(PreActivationBlock\), but is 3"):
        blocks.resnet18(version=3)
    for name in ("TransformerBlock", "AddTransformerBlock"):
        block = getattr(blocks, name)
        for heads in (3, 0, -2, 2.0, "2", None):
            given = f"but is {heads!r} and dim is 8"
            with pytest.raises(ValueError, match=f"^{name}: num_heads must be an integer that divides dim, {given}"):
                block(8, heads)
        for ratio in (0.0, 0.124, -1, float("nan"), float("inf")):
            given = f"but mlp_ratio is {ratio} and dim is 8"
            with pytest.raises(ValueError, match=rf"^{name}: mlp_ratio \* dim must be finite and at least 1, {given}"):
                block(8, 2, ratio)
        with pytest.raises(TypeError, match=f"^{name}: mlp_ratio must be a number, but is '4'"):
            block(8, 2, "4")
        assert block(8, 2, 0.125).mlp[0].out_features == 1
    for shape in ((3, 8), (2, 3, 4)):
        with pytest.raises(ValueError, match=r"x must have shape \(N, T, 8\), but has shape \(.*\)"):
            blocks.TransformerBlock(8, 2)(torch.zeros(shape))
    with pytest.raises(ValueError, match="drop_path_p"):
        blocks.TransformerBlock(8, 2, drop_path_p=1.5)


def test_groups_have_two_channels_or_more():
    assert [norms.num_groups(channels) for channels in (1, 2, 3, 4, 24, 64, 70, 96, 2048)] == [
        *(1, 1, 1, 2, 12, 32, 14, 32, 32)
    ]


@pytest.mark.parametrize("module", ["norms", "residual", "resnet", "transformer"])
def test_examples_are_right(module):
    tested = importlib.import_module(f"fused_ops.blocks.{module}")
    assert doctest.testmod(tested, extraglobs={"torch": torch, "fused_ops": fused_ops}).failed == 0
