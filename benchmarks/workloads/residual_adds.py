"""The workloads of the residual add, each size with its reason."""

from __future__ import annotations

from .channel_norms import images
from .row_norms import LLAMA_3_8B, LLAMA_3_8B_CONTEXT, VIT_B, VIT_B_TOKENS, tokens
from .workload import Workload

RESIDUAL_ADDS = (
    # The bare sum of a Transformer's stream, which keeps nothing and whose backward is nothing; Llama 3 8B as for its
    # norms: two contexts are 128 MiB in 16 bits.
    Workload(
        "llama3_8b_residual_add", "residual_add", tokens((2, LLAMA_3_8B_CONTEXT), (1, 2048), LLAMA_3_8B), residual=True
    ),
    # The end of a block of ResNet v1 without its norm, first stage at 224 x 224: a mask stands for the slope.
    Workload(
        "resnet50_256x56_residual_add_relu",
        "residual_add",
        images(256, (56, 56), 64, 4),
        residual=True,
        activation="relu",
    ),
    # A slope that takes any value, for which x and the residual are read again.
    Workload(
        "unet_320_residual_add_silu",
        "residual_add",
        images(320, (64, 64), 32, 4),
        residual=True,
        activation="silu",
        in_default_run=False,
    ),
    # Layer scale: CaiT's, over the last dim of a ViT's tokens, and ConvNeXt-T's of the first and the last stage in the
    # layout of images, where planes of 7 x 7 begin between 16-byte boundaries.
    Workload(
        "vit_b_residual_add_layer_scale",
        "residual_add_layer_scale",
        tokens((256, VIT_B_TOKENS), (64, VIT_B_TOKENS), VIT_B),
        residual=True,
    ),
    Workload(
        "convnext_96x56_residual_add_layer_scale",
        "residual_add_channel_scale",
        images(96, (56, 56), 128, 16),
        residual=True,
    ),
    # The same where channels are neighbours, and 96 columns are few for the sum of the scale's gradient.
    Workload(
        "convnext_96x56_residual_add_layer_scale_channels_last",
        "residual_add_channel_scale",
        images(96, (56, 56), 128, 16),
        residual=True,
        channels_last=True,
    ),
    Workload(
        "convnext_768x7_residual_add_layer_scale",
        "residual_add_channel_scale",
        images(768, (7, 7), 256, 64),
        residual=True,
        fits_cache=True,
    ),
    # Launch-bound: a token of each of 16 sequences.
    Workload(
        "llama3_8b_decode_residual_add",
        "residual_add",
        tokens((16, 1), (16, 1), LLAMA_3_8B),
        residual=True,
        launch_bound=True,
    ),
)
