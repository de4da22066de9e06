"""The workloads of the row norms, each size with its reason."""

from __future__ import annotations

from .workload import Shape, Shapes, Workload

# A GPU's caches hold up to some 60 MB (an H200's 50), so that a figure of bandwidth needs tensors above that: 2^26
# elements are 128 MiB in 16 bits, the same for every span, so that the spans read as one curve.
FULL_ELEMENTS = 2**26
# 32 MiB of float32 on a CPU: a call, which touches two and more of them, finds little in the caches, and lasts some
# milliseconds. Python's part of it is some 30 us, since a call that has swept the caches finds Python's own code and
# objects gone as well.
REDUCED_ELEMENTS = 2**23
# A program, or several rows of one, and a remainder: enough for an interpreter.
TINY_ROWS = 3


def swept(span: int) -> Shapes:
    """As many rows of the span as the volumes above hold."""
    return Shapes((FULL_ELEMENTS // span, span), (REDUCED_ELEMENTS // span, span), (TINY_ROWS, span))


def tokens(full: Shape, reduced: Shape, hidden: int) -> Shapes:
    """Activations of a model: batch and sequence, then the hidden size."""
    return Shapes((*full, hidden), (*reduced, hidden), (1, TINY_ROWS, hidden))


# Hidden sizes and sequence lengths of the models, from their configurations.
GPT2, GPT2_CONTEXT = 768, 1024
LLAMA_3_8B, LLAMA_3_8B_CONTEXT = 4096, 8192
VIT_B, VIT_B_TOKENS = 768, 197  # 14 x 14 patches and the class token: a number of rows that no tile divides

ROW_NORMS = (
    # The spans, bare. 256: several rows share a program, 512 bytes a row. 1024: where section 5 of the design asks for
    # the full rate. 4096: the widest row a warp group holds comfortably. 16384: the largest that stays on chip. 65536:
    # rows are walked in chunks, and the 128 (GPU: 1024) of them must fill the device.
    Workload("layer_norm_256", "layer_norm", swept(256)),
    Workload("layer_norm_1024", "layer_norm", swept(1024), compiled_on_cpu=True),
    Workload("layer_norm_4096", "layer_norm", swept(4096)),
    Workload("layer_norm_16384", "layer_norm", swept(16384)),
    Workload("layer_norm_65536", "layer_norm", swept(65536)),
    # The spans between, on the other norm and with the residual stream: 8192 is the largest row that the backward holds
    # with its weight gradients, 32768 the largest that a bare forward holds.
    Workload("rms_norm_512", "rms_norm", swept(512), in_default_run=False),
    Workload("rms_norm_2048", "rms_norm", swept(2048), in_default_run=False),
    Workload("rms_norm_8192", "rms_norm", swept(8192)),
    Workload("rms_norm_32768", "rms_norm", swept(32768), in_default_run=False),
    Workload("add_rms_norm_2048", "add_rms_norm", swept(2048), in_default_run=False),
    Workload("add_rms_norm_8192", "add_rms_norm", swept(8192), in_default_run=False),
    Workload("add_rms_norm_32768", "add_rms_norm", swept(32768)),
    # GPT-2 (124 M): a batch of 64 full contexts is 96 MiB in 16 bits; 8 of them, 24 MiB of float32, occupy a CPU.
    Workload("gpt2_layer_norm", "layer_norm", tokens((64, GPT2_CONTEXT), (8, GPT2_CONTEXT), GPT2)),
    Workload("gpt2_add_layer_norm", "add_layer_norm", tokens((64, GPT2_CONTEXT), (8, GPT2_CONTEXT), GPT2)),
    # Llama 3 8B: two contexts are 128 MiB in 16 bits; on a CPU a quarter of one context, 32 MiB.
    Workload("llama3_8b_rms_norm", "rms_norm", tokens((2, LLAMA_3_8B_CONTEXT), (1, 2048), LLAMA_3_8B)),
    Workload(
        "llama3_8b_add_rms_norm",
        "add_rms_norm",
        tokens((2, LLAMA_3_8B_CONTEXT), (1, 2048), LLAMA_3_8B),
        compiled_on_cpu=True,
    ),
    # ViT-B/16 at 224 x 224: a training batch of 256 images is 74 MiB in 16 bits; on a CPU 64, 37 MiB of float32.
    Workload("vit_b_layer_norm", "layer_norm", tokens((256, VIT_B_TOKENS), (64, VIT_B_TOKENS), VIT_B)),
    Workload(
        "vit_b_add_layer_norm",
        "add_layer_norm",
        tokens((256, VIT_B_TOKENS), (64, VIT_B_TOKENS), VIT_B),
        compiled_on_cpu=True,
    ),
    # What else is fused, at the one span 1024, so that each line shows the price of its part: the activation alone, the
    # residual alone, both with a slope that takes any value, and both with one that takes two (a mask is kept).
    Workload("layer_norm_gelu", "layer_norm", swept(1024), activation="gelu"),
    Workload("layer_norm_residual", "layer_norm", swept(1024), residual=True, in_default_run=False),
    Workload(
        "layer_norm_residual_gelu", "layer_norm", swept(1024), residual=True, activation="gelu", compiled_on_cpu=True
    ),
    Workload("layer_norm_residual_relu", "layer_norm", swept(1024), residual=True, activation="relu"),
    Workload("rms_norm_silu", "rms_norm", swept(1024), activation="silu", in_default_run=False),
    Workload("rms_norm_residual_silu", "rms_norm", swept(1024), residual=True, activation="silu"),
    Workload("add_layer_norm_relu", "add_layer_norm", swept(1024), activation="relu", in_default_run=False),
    Workload("add_rms_norm_silu", "add_rms_norm", swept(1024), activation="silu", in_default_run=False),
    # Launch-bound: a step of decoding, one new token of each of 8 (GPT-2) or 16 (Llama) sequences, and one image. They
    # fit any cache, and what counts is the time a launch takes on the device and on the host.
    Workload("gpt2_decode_add_layer_norm", "add_layer_norm", tokens((8, 1), (8, 1), GPT2), launch_bound=True),
    Workload("llama3_8b_decode_rms_norm", "rms_norm", tokens((16, 1), (16, 1), LLAMA_3_8B), launch_bound=True),
    Workload("llama3_8b_decode_add_rms_norm", "add_rms_norm", tokens((16, 1), (16, 1), LLAMA_3_8B), launch_bound=True),
    Workload(
        "vit_b_one_image_add_layer_norm",
        "add_layer_norm",
        tokens((1, VIT_B_TOKENS), (1, VIT_B_TOKENS), VIT_B),
        launch_bound=True,
    ),
)
