"""Benchmarks: the fused calls beside what a user of torch would write, on whatever device is there."""
