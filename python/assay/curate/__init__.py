"""From a scores folder to a curated corpus."""

from assay.curate.curation import Curated, curate
from assay.curate.rules import RuleOptions

__all__ = ["Curated", "RuleOptions", "curate"]
