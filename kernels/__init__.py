"""Triton kernels, one file per op, installed as ``assay.kernels``. None has landed yet: every op runs on the CPU."""
