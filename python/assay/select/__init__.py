"""From scores to a choice: which rows to keep, with which weight, and why.

Every rule takes a score table (a `pyarrow.Table`) and the name of a score, and returns a `Selection`. Which
end of the score is kept comes from the column's metadata, or from ``keep="high"`` / ``"low"``. A NaN score is
never kept, ties go to the earlier row, and every draw takes a seed: the same input gives the same selection.
"""

from assay.select.auditing import Cut, fbeta_cut
from assay.select.mixing import mix
from assay.select.mixtures import gmm, kmeans
from assay.select.rules import draw, quantile, random, sample, threshold, top, weigh
from assay.select.selection import Selection
from assay.select.targets import robust, round_robin
from assay.select.votes import Quality, average, quality, vote

__all__ = [
    "Cut",
    "Quality",
    "Selection",
    "average",
    "draw",
    "fbeta_cut",
    "gmm",
    "kmeans",
    "mix",
    "quality",
    "quantile",
    "random",
    "robust",
    "round_robin",
    "sample",
    "threshold",
    "top",
    "vote",
    "weigh",
]
