"""A scores folder as a live page on this machine: cuts that are dragged, and what they keep."""

from assay.explore.command import select_command
from assay.explore.cuts import Cut, parse_cuts
from assay.explore.explorer import Explorer, open_explorer
from assay.explore.server import open_server

__all__ = ["Cut", "Explorer", "open_explorer", "open_server", "parse_cuts", "select_command"]
