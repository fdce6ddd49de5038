"""Kernel benchmarks: ``python -m benchmarks.kernels [ensemble] [gradients]``. One file per op."""
