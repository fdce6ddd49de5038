"""Kernel benchmarks: ``python -m benchmarks.kernels [ensemble] [head] [gradients] [sketch] [scan]``. One file per op."""
