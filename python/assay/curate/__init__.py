"""From a scores folder to a curated corpus, or to the samples at both ends of a score."""

from assay.curate.curation import Curated, curate
from assay.curate.ranking import Ranked, Ranking, rank, read_samples
from assay.curate.rules import RuleOptions

__all__ = ["Curated", "Ranked", "Ranking", "RuleOptions", "curate", "rank", "read_samples"]
