"""fuse on models of torchvision, timm and transformers with random weights; skipped where their library is not.

In float64, where two ways of computing one thing differ by nothing that a model could blow up: in float32 the gradients
of some models (BiT's on a CPU) are off by a fifth, whoever computes them."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from fused_ops import fuse, fusion_report, unfuse

pytestmark = pytest.mark.one_in(8)

Tensor = torch.Tensor


def library(name: str) -> Any:
    """The library, or a skip."""
    return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


@pytest.fixture(scope="module", autouse=True)
def operators_of_torchvision():
    """timm imports torchvision, whose wheel for CUDA beside a CPU torch lacks operators of detection that its import
    looks for."""
    with contextlib.suppress(ImportError):
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            definitions = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                definitions.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            importlib.import_module("torchvision")
            yield definitions  # they are there as long as this is
            return
    yield None


def transformer(model: str, config: str, **options: Any) -> torch.nn.Module:
    transformers = library("transformers")
    return getattr(transformers, model)(getattr(transformers, config)(**options))


def of_timm(name: str, **options: Any) -> Any:
    return lambda: library("timm").create_model(name, num_classes=5, **options)


def of_torchvision(name: str) -> Any:
    return lambda: getattr(library("torchvision").models, name)(num_classes=5)


def image(size: int = 32) -> Any:
    return lambda: (torch.randn(2, 3, size, size),)


def pixels(**more: Any) -> Any:
    return lambda: {"pixel_values": torch.randn(2, 3, 32, 32), **more}


def tokens(**more: Any) -> Any:
    ids = torch.arange(24).view(2, 12) % 40
    return lambda: {"input_ids": ids, **more}


BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WORDS = tokens(labels=(torch.arange(24).view(2, 12) * 7) % 40)
CLASSES = {"labels": torch.tensor([0, 1])}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}

# How it is made, what it is called with, whether fuse sees the call, and what is fused.
MODELS: dict[str, tuple[Any, Any, bool, dict[str, int]]] = {
    "bert": (
        lambda: transformer("BertForSequenceClassification", "BertConfig", vocab_size=40, **BLOCKS),
        tokens(attention_mask=torch.ones(2, 12, dtype=torch.long), **CLASSES),
        True,
        {"add+norm": 5},
    ),
    "gpt2": (
        lambda: transformer("GPT2LMHeadModel", "GPT2Config", vocab_size=40, n_embd=32, n_layer=2, n_head=4),
        WORDS,
        True,
        {"norm": 3, "add+norm": 2},
    ),
    "llama": (
        lambda: transformer("LlamaForCausalLM", "LlamaConfig", vocab_size=40, num_key_value_heads=2, **BLOCKS),
        WORDS,
        True,
        {"norm": 3, "add+norm": 2},
    ),
    "t5": (
        lambda: transformer(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=40,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        WORDS,
        False,
        {"norm": 12},
    ),
    "transformers vit": (
        lambda: transformer("ViTForImageClassification", "ViTConfig", image_size=32, patch_size=8, **BLOCKS),
        pixels(**CLASSES),
        True,
        {"norm": 3, "add+norm": 2},
    ),
    "wav2vec2": (
        lambda: transformer(
            "Wav2Vec2Model",
            "Wav2Vec2Config",
            conv_dim=(16, 16),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            mask_time_prob=0.0,
            layerdrop=0.0,
            **BLOCKS,
        ),
        lambda: {"input_values": torch.randn(2, 600)},
        False,
        {"norm+gelu": 1, "norm": 6},
    ),
    "detr": (
        lambda: transformer(
            "DetrForObjectDetection",
            "DetrConfig",
            backbone_config=library("transformers").ResNetConfig(**RESNET, out_features=["stage2"]),
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            num_queries=5,
        ),
        pixels(),
        False,
        {"norm+relu": 4, "norm+add+relu": 3, "norm": 7},
    ),
    "transformers resnet": (
        lambda: transformer("ResNetForImageClassification", "ResNetConfig", **RESNET),
        pixels(**CLASSES),
        False,
        {"norm+relu": 4, "norm+add+relu": 3, "norm": 1},
    ),
    "transformers bit": (
        lambda: transformer(
            "BitForImageClassification",
            "BitConfig",
            embedding_size=32,
            hidden_sizes=[32, 64],
            depths=[1, 2],
            num_groups=8,
        ),
        pixels(**CLASSES),
        False,
        {"weight_standardize": 12, "norm+relu": 10},
    ),
    "torchvision resnet18": (
        of_torchvision("resnet18"),
        image(),
        False,
        {"norm+relu": 9, "norm+add+relu": 8, "norm": 3},
    ),
    "torchvision resnet50": (
        of_torchvision("resnet50"),
        image(),
        False,
        {"norm+relu": 33, "norm+add+relu": 16, "norm": 4},
    ),
    "torchvision swin": (of_torchvision("swin_t"), image(), False, {"norm": 17, "add+norm": 12}),
    "timm resnet18": (of_timm("resnet18"), image(), False, {"norm+relu": 9, "norm+add+relu": 8, "norm": 3}),
    "timm resnet v2": (of_timm("resnetv2_50", layers=(1, 2, 1, 1)), image(), False, {"norm+relu": 16}),
    "timm bit": (of_timm("resnetv2_50x1_bit"), image(), False, {"weight_standardize": 53, "norm+relu": 49}),
    "timm vit": (of_timm("vit_tiny_patch16_224", img_size=32, depth=3), image(), False, {"norm": 4, "add+norm": 3}),
    "timm swin": (
        of_timm("swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(1, 2, 1, 1)),
        image(56),
        False,
        {"norm": 15},
    ),
    "timm convnext": (of_timm("convnext_atto", depths=(1, 2, 1, 1)), image(), False, {"norm": 10}),
    "timm regnet": (of_timm("regnety_002"), image(), False, {"norm+relu": 27, "norm+add+relu": 13, "norm": 4}),
    "timm efficientnet": (of_timm("efficientnet_b0"), image(), False, {"norm+silu": 33, "norm": 7, "norm+add": 9}),
    "timm mobilenetv3": (
        of_timm("mobilenetv3_small_050"),
        image(),
        True,
        {"norm+hardswish": 18, "norm+relu": 5, "norm": 4, "norm+add": 7},
    ),
    "timm densenet": (
        of_timm("densenet121", growth_rate=8, block_config=(2, 3, 2, 2)),
        image(),
        False,
        {"norm+relu": 23},
    ),
}


# Their own norms compute in it, whatever they are given.
IN_FLOAT32 = ("llama", "t5")


def in_type(inputs: Any, dtype: torch.dtype) -> Any:
    return tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, inputs
    )


def called(model: torch.nn.Module, given: Any) -> Any:
    given = copy.deepcopy(given)
    return model(**given) if isinstance(given, dict) else model(*given)


def tensors(out: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def loss_of(out: Any) -> Tensor:
    """The model's own, or one that weighs each number otherwise."""
    own = getattr(out, "loss", None)
    if own is not None:
        return own
    return sum((part * torch.linspace(0, 7, part.numel()).cos().view_as(part)).mean() for part in tensors(out))  # type: ignore[return-value]


def trained(model: torch.nn.Module, given: Any) -> list[Tensor]:
    """Outputs, losses and gradients of two steps, buffers, then outputs in evaluation, and the next random numbers."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    torch.manual_seed(3)
    left: list[Tensor] = []
    for _ in range(2):
        optimizer.zero_grad()
        outputs = called(model.train(), given)
        loss = loss_of(outputs)
        loss.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert loss.abs() > 1e-6
        assert sum(gradient.abs().max() > 1e-9 for gradient in gradients) > len(gradients) // 2
        left += [*tensors(outputs), loss, *gradients]
        optimizer.step()
    with torch.no_grad():
        left += [*(b.clone() for b in model.buffers()), *tensors(called(model.eval(), given))]
    return [*(tensor.detach() for tensor in left), torch.rand(2)]


LONG = (
    "timm bit",
    "transformers vit",
    "torchvision resnet18",
    "torchvision resnet50",
    "torchvision swin",
)  # what is in them is in smaller ones


@pytest.mark.one_in(10)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name in LONG else ()) for name in MODELS]
)
def test_a_fused_model_trains_as_the_original(name: str) -> None:
    make, inputs, with_example, patterns = MODELS[name]
    torch.manual_seed(0)
    dtype, rounding = (torch.float32, 1e-5) if name in IN_FLOAT32 else (torch.float64, 1e-8)
    model, given = make().to(dtype), in_type(inputs(), dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # some branches begin at 0, and would hide what is in them
            parameter += 0.05 * torch.randn_like(parameter)
    original = copy.deepcopy(model)
    parameters, keys = list(map(id, model.parameters())), list(model.state_dict())
    fuse(model, given if with_example else None)
    report = fusion_report(model)
    assert [entry for entry in report if not entry.fused] == []
    assert Counter(entry.pattern for entry in report) == patterns
    assert list(map(id, model.parameters())) == parameters
    assert list(model.state_dict()) == keys
    for ours, expected in zip(trained(model, given), trained(original, given), strict=True):
        scale = max(1e-6, float(expected.abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(ours, expected, rtol=0, atol=rounding * scale)
    unfuse(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in original.modules()]
    original.load_state_dict(model.state_dict())
    for ours, expected in zip(tensors(called(model, given)), tensors(called(original, given)), strict=True):
        assert torch.equal(ours, expected)
