"""The workloads of group norm, instance norm and weight standardization, each size with its reason."""

from __future__ import annotations

from .workload import Shape, Shapes, Workload

# On a GPU the batch is what makes 80 MiB of 16 bits and more, beyond any cache; on a CPU what occupies one for some
# milliseconds. For an interpreter a few positions, of as many channels.


def images(channels: int, positions: Shape, full: int, reduced: int, tiny: Shape | None = None) -> Shapes:
    """Batches of so many samples of one size; tiny: its positions, where not 3 along each dim."""
    own = (channels, *positions)
    return Shapes((full, *own), (reduced, *own), (2, channels, *(tiny or (3,) * len(positions))))


CHANNEL_NORMS = (
    # Stable Diffusion's U-Net, GroupNorm 32 and SiLU at its four levels: groups of 40,960, 20,480, 10,240 and 5,120
    # elements. The first two are shared by programs, the third is held by the forward alone, the last by both.
    Workload("sd_unet_320_group_norm", "group_norm", images(320, (64, 64), 32, 4), activation="silu", groups=32),
    Workload(
        "sd_unet_640_group_norm",
        "group_norm",
        images(640, (32, 32), 64, 8),
        activation="silu",
        groups=32,
        in_default_run=False,
    ),
    Workload("sd_unet_1280_group_norm", "group_norm", images(1280, (16, 16), 128, 16), activation="silu", groups=32),
    Workload(
        "sd_unet_2560_group_norm",
        "group_norm",
        images(2560, (8, 8), 256, 32),
        activation="silu",
        groups=32,
        in_default_run=False,
    ),
    # The same where the model runs channels_last, as diffusers recommends; and with the residual stream.
    Workload(
        "sd_unet_320_group_norm_channels_last",
        "group_norm",
        images(320, (64, 64), 32, 4),
        activation="silu",
        groups=32,
        channels_last=True,
    ),
    Workload(
        "sd_unet_1280_group_norm_channels_last",
        "group_norm",
        images(1280, (16, 16), 128, 16),
        activation="silu",
        groups=32,
        channels_last=True,
        in_default_run=False,
    ),
    Workload(
        "sd_unet_640_add_group_norm",
        "add_group_norm",
        images(640, (32, 32), 64, 8),
        activation="silu",
        groups=32,
        in_default_run=False,
    ),
    # Its VAE's decoder, at the last level: 32 groups of a million elements a sample must fill a device.
    Workload("sd_vae_128_group_norm", "group_norm", images(128, (512, 512), 2, 1), activation="silu", groups=32),
    # nnU-Net in 3-D at its first level, a batch of 2: InstanceNorm and LeakyReLU on planes of two million.
    Workload(
        "nnunet_32_instance_norm",
        "instance_norm",
        Shapes((2, 32, 128, 128, 128), (1, 32, 64, 64, 64), (2, 32, 3, 3, 3)),
        activation="leaky_relu",
    ),
    Workload(
        "nnunet_32_instance_norm_channels_last",
        "instance_norm",
        Shapes((2, 32, 128, 128, 128), (1, 32, 64, 64, 64), (2, 32, 3, 3, 3)),
        activation="leaky_relu",
        channels_last=True,
        in_default_run=False,
    ),
    # CycleGAN's residual blocks at 256 x 256 images: planes of 4096, which a program holds; the second of a block adds.
    Workload("cyclegan_256_instance_norm", "instance_norm", images(256, (64, 64), 40, 4), activation="relu"),
    Workload(
        "cyclegan_256_instance_norm_residual",
        "instance_norm",
        images(256, (64, 64), 40, 4),
        residual=True,
        in_default_run=False,
    ),
    # BiT-ResNet-50: GroupNorm 32 and ReLU. Planes of 14 x 14 and 7 x 7 begin between 16-byte boundaries.
    Workload("bit_256_group_norm", "group_norm", images(256, (56, 56), 64, 4), activation="relu", groups=32),
    Workload("bit_1024_group_norm", "group_norm", images(1024, (14, 14), 256, 16), activation="relu", groups=32),
    Workload(
        "bit_2048_group_norm",
        "group_norm",
        images(2048, (7, 7), 512, 32),
        activation="relu",
        groups=32,
        in_default_run=False,
    ),
    # And its weights, of which the largest of the widest model (152 x 4) is 72 MiB in 16 bits.
    Workload(
        "bit_weight_standardize",
        "weight_standardize",
        Shapes((2048, 2048, 3, 3), (512, 512, 3, 3), (4, 64, 3, 3)),
    ),
    # A detector's head, batch 2 at the largest level: it fits a cache.
    Workload(
        "detector_256_group_norm",
        "group_norm",
        images(256, (100, 152), 2, 1),
        activation="relu",
        groups=32,
        launch_bound=True,
    ),
)
