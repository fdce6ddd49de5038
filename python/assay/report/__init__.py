"""A scores folder as one page of HTML, without scripts and without a network."""

from assay.report.charts import need_charts
from assay.report.confusion import Confusion, count_labels
from assay.report.duplicates import Duplicates, find_duplicates
from assay.report.facts import Facts, gather
from assay.report.groups import NOT_READ, NOTHING, Groups, find_columns, read_groups
from assay.report.neighbours import Neighbours, find_neighbours
from assay.report.output import open_output
from assay.report.page import Page
from assay.report.pictures import thumbnail
from assay.report.rows import Ends, Shown
from assay.report.surveying import SAMPLE_ROWS, Distribution, Survey, survey

__all__ = [
    "NOTHING",
    "NOT_READ",
    "SAMPLE_ROWS",
    "Confusion",
    "Distribution",
    "Duplicates",
    "Ends",
    "Facts",
    "Groups",
    "Neighbours",
    "Page",
    "Shown",
    "Survey",
    "count_labels",
    "find_columns",
    "find_duplicates",
    "find_neighbours",
    "gather",
    "need_charts",
    "open_output",
    "read_groups",
    "survey",
    "thumbnail",
]
