"""From a scores folder to a curated corpus, or to the samples at both ends of a score."""

from assay.curate.auditing import Audit, Labels, read_labels
from assay.curate.condition import ExpressionError
from assay.curate.curation import Curated, curate
from assay.curate.duplicates import Duplicates, find_duplicates
from assay.curate.explaining import Explained, Explanation, explain
from assay.curate.fates import Fate
from assay.curate.mixes import Mix, read_mix
from assay.curate.proofs import Proof, check_proof
from assay.curate.ranking import Ranked, Ranking, rank, ranked_at, read_samples
from assay.curate.rules import RuleOptions, parse_amount, parse_end
from assay.curate.whole import WholeTable, read_whole

__all__ = [
    "Audit",
    "Curated",
    "Duplicates",
    "Explained",
    "Explanation",
    "ExpressionError",
    "Fate",
    "Labels",
    "Mix",
    "Proof",
    "Ranked",
    "Ranking",
    "RuleOptions",
    "WholeTable",
    "check_proof",
    "curate",
    "explain",
    "find_duplicates",
    "parse_amount",
    "parse_end",
    "rank",
    "ranked_at",
    "read_labels",
    "read_mix",
    "read_samples",
    "read_whole",
]
