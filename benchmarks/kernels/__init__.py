"""Kernel benchmarks: ``python -m benchmarks.kernels [ensemble] [head] [gradients] [sketch] [scan]``: a file per op."""
