"""Device code and its launchers, which know pointers, sizes and tiles. Installed as fused_ops.kernels."""
