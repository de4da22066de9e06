"""The workloads of batch norm and of switchable norm, each size with its reason."""

from __future__ import annotations

from typing import Any

from .channel_norms import images
from .workload import Shapes, Workload

# ResNet-50's batch norms on images of 224 x 224: channels, side of a plane, and whether the norm ends a block, where
# the shortcut is added before the ReLU.
RESNET_50: tuple[tuple[int, int, bool], ...] = (
    (64, 112, False), (64, 56, False), (256, 56, True),
    (128, 56, False), (128, 28, False), (512, 28, True),
    (256, 28, False), (256, 14, False), (1024, 14, True),
    (512, 14, False), (512, 7, False), (2048, 7, True),
)  # fmt: skip
# A GPU's batch, and that of one of many, at which late stages fit on chip; on a CPU a sixteenth.
BATCHES = (256, 32)
LEAST_TO_FILL = 2**25  # elements, of 16 bits 64 MiB
# One of each way through the kernels: planes in pieces, and joint runs of them, in either layout, cut and whole.
IN_DEFAULT_RUN = frozenset(
    {
        "resnet50_64x56_batch_norm",
        "resnet50_256x56_batch_norm_residual",
        "resnet50_256x56_batch_norm_residual_channels_last",
        "resnet50_1024x14_batch_norm_residual",
        "resnet50_512x7_batch_norm_channels_last",
        "resnet50_2048x7_batch32_batch_norm_residual",
        "resnet50_256x56_switch_norm_residual",
        "resnet50_1024x14_switch_norm_residual_channels_last",
    }
)


def _resnet(
    channels: int, side: int, ends_block: bool, batch: int, channels_last: bool, function: str = "batch_norm"
) -> Workload:
    name = f"resnet50_{channels}x{side}{'' if batch == BATCHES[0] else f'_batch{batch}'}_{function}"
    name += "_residual" * ends_block + "_channels_last" * channels_last
    return Workload(
        name,
        function,
        images(channels, (side, side), batch, max(2, batch // 16)),
        residual=ends_block,
        activation="relu",
        channels_last=channels_last,
        fits_cache=batch * channels * side * side < LEAST_TO_FILL,
        in_default_run=name in IN_DEFAULT_RUN,
    )


def _of(name: str, shapes: Shapes, activation: str, **options: Any) -> Workload:
    return Workload(name, "batch_norm", shapes, activation=activation, **options)


BATCH_NORMS = (
    *(
        _resnet(*norm, batch, channels_last)
        for batch in BATCHES
        for norm in RESNET_50
        for channels_last in (False, True)
    ),
    *(
        _resnet(*norm, BATCHES[0], channels_last, "switch_norm")
        for norm in RESNET_50
        for channels_last in (False, True)
    ),
    # Batch norm by running statistics, as it is served; and where the shortcut is added first (ResNet v2).
    Workload(
        "resnet50_256x56_batch_norm_eval",
        "batch_norm",
        images(256, (56, 56), 256, 16),
        residual=True,
        activation="relu",
        training=False,
    ),
    Workload("resnet50v2_256x56_add_batch_norm", "add_batch_norm", images(256, (56, 56), 256, 16), activation="relu"),
    # MobileNetV3-Large, late: planes of 14 x 14 and 7 x 7 with hardswish.
    _of("mobilenetv3_672x14_batch_norm", images(672, (14, 14), 512, 32), "hardswish"),
    _of("mobilenetv3_960x7_batch_norm", images(960, (7, 7), 1024, 64), "hardswish", in_default_run=False),
    # EfficientNet-B0: the widest expansion, and a late one.
    _of("efficientnet_96x112_batch_norm", images(96, (112, 112), 128, 4), "silu", in_default_run=False),
    _of("efficientnet_1152x7_batch_norm_channels_last", images(1152, (7, 7), 1024, 64), "silu", channels_last=True),
    # A 3-D U-Net at its first level, a batch of 2: 32 channels of four million values must fill a device.
    Workload(
        "unet3d_32_batch_norm",
        "batch_norm",
        Shapes((2, 32, 128, 128, 128), (1, 32, 64, 64, 64), (2, 32, 3, 3, 3)),
        activation="relu",
    ),
    # PointNet: clouds of 2,500 points, 1,024 features of each; then a feature vector a cloud.
    _of("pointnet_1024_batch_norm", images(1024, (2500,), 32, 4), "relu"),
    _of("pointnet_512_batch_norm_vectors", Shapes((32, 512), (32, 512), (8, 512)), "relu", launch_bound=True),
)
