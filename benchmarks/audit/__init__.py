"""Performance seen without a GPU: compiled kernels read, memory traffic counted, memory accesses checked."""
