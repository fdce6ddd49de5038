"""Pure functions of tensors, each with a plain torch reference and native kernels behind one contract.

float32, bfloat16 or float16 in (float64 runs the reference), any strides; float32 out, on the same device. The n-grams'
ops alone take texts, and give numbers of NumPy.
"""

from assay.ops._build import build_info
from assay.ops.distillation import linear_distillation
from assay.ops.dot import grad_dot
from assay.ops.ensemble import EnsembleStats, ensemble_stats
from assay.ops.head import HeadScores, head_scores, linear_cross_entropy, linear_ensemble_stats
from assay.ops.layer_sketch import grad_sketch
from assay.ops.minhash import least_hashes
from assay.ops.ngrams import NGramCounts, NGramHashes, Terms, ngram_counts, ngram_hashes
from assay.ops.projection import project
from assay.ops.scan import scan_scores, topk_scan
from assay.ops.sketch import Kronecker, Mask, Rademacher, Sketch, Sparse
from assay.ops.sqnorm import grad_sqnorm

__all__ = [
    "EnsembleStats",
    "HeadScores",
    "Kronecker",
    "Mask",
    "NGramCounts",
    "NGramHashes",
    "Rademacher",
    "Sketch",
    "Sparse",
    "Terms",
    "build_info",
    "ensemble_stats",
    "grad_dot",
    "grad_sketch",
    "grad_sqnorm",
    "head_scores",
    "least_hashes",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_ensemble_stats",
    "ngram_counts",
    "ngram_hashes",
    "project",
    "scan_scores",
    "topk_scan",
]
