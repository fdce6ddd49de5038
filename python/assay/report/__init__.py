"""A scores folder as one page of HTML, without scripts and without a network."""

from assay.report.charts import need_charts
from assay.report.confusion import Confusion, count_labels
from assay.report.facts import Facts, gather
from assay.report.output import open_output
from assay.report.page import Page
from assay.report.pictures import thumbnail
from assay.report.rows import Ends, Shown
from assay.report.surveying import SAMPLE_ROWS, Survey, survey

__all__ = [
    "SAMPLE_ROWS",
    "Confusion",
    "Ends",
    "Facts",
    "Page",
    "Shown",
    "Survey",
    "count_labels",
    "gather",
    "need_charts",
    "open_output",
    "survey",
    "thumbnail",
]
