"""How a GPU's kernels are measured: ``python -m benchmarks.gpu``. What is measured stands in benchmarks.kernels."""
