"""Where the page goes: a new file, or in the place of an earlier page; never into the corpus or among the scores."""

from __future__ import annotations

import os

from assay.corpus.errors import CorpusError
from assay.corpus.scores_folder import Scores, refuse_corpora, refuse_scores
from assay.corpus.storage import Store
from assay.report.html import Html

# The page's beginning, by which it is known again.
MARK = Html(
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="assay report">'
)


def open_output(url: str, scores: Scores) -> tuple[Store, str]:
    """The folder that the page goes into, and its name there.

    Raises:
        CorpusError: it would lie in a corpus or among the scores, or in the place of a file that is no such page.
    """
    page = Store.at(url)
    store, name = Store(page.fs, os.path.dirname(page.root) or "/"), os.path.basename(page.root)
    if not name or url.endswith("/") or page.fs.isdir(page.root):
        raise CorpusError(f"--out {url}: is a folder; expected a file, such as page.html")
    refuse_corpora(page, scores, [""])
    refuse_scores(page, scores.store)
    if store.exists(name):
        with store.open(name) as file:
            if file.read(len(MARK)) != MARK.encode():
                raise CorpusError(f"--out {url}: exists, and is no report of assay; move it away or give another name")
    return store, name
