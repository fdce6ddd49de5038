"""Kernel benchmarks: ``python -m benchmarks.kernels [ensemble] [head] [gradients]``. One file per op."""
