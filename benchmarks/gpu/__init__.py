"""How a case of benchmarks.kernels is measured on a GPU, and how that is told. ``make gpu`` runs it (tests/gpu)."""
