"""Kernel benchmarks: ``python -m benchmarks.kernels [ensemble] [gradients] [scan]``. One file per op."""
