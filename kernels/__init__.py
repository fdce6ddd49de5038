"""Triton kernels, one file per op (the output layer takes several), installed as ``assay.kernels``."""
