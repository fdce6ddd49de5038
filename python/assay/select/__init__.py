"""From scores to a choice: which rows to keep, with which weight, and why.

Every rule takes a score table (a `pyarrow.Table`) and the name of a score, and returns a `Selection`. Which
end of the score is kept comes from the column's metadata, or from ``keep="high"`` / ``"low"``. A NaN score is
never kept, ties go to the earlier row, and every draw takes a seed: the same input gives the same selection.
"""

from assay.select.auditing import Cut, GroupCuts, cut_groups, fbeta_cut, fbeta_cuts
from assay.select.clip import clip_powered
from assay.select.mixing import mix
from assay.select.mixtures import gmm, kmeans
from assay.select.neighbours import d2, semdedup
from assay.select.rules import draw, quantile, random, sample, threshold, top, weigh
from assay.select.selection import Selection
from assay.select.strata import ccs
from assay.select.targets import in_turns, robust, round_robin
from assay.select.trust import trust
from assay.select.votes import Quality, average, quality, vote

__all__ = [
    "Cut",
    "GroupCuts",
    "Quality",
    "Selection",
    "average",
    "ccs",
    "clip_powered",
    "cut_groups",
    "d2",
    "draw",
    "fbeta_cut",
    "fbeta_cuts",
    "gmm",
    "in_turns",
    "kmeans",
    "mix",
    "quality",
    "quantile",
    "random",
    "robust",
    "round_robin",
    "sample",
    "semdedup",
    "threshold",
    "top",
    "trust",
    "vote",
    "weigh",
]
