"""No command writes among scores, whoever's they are."""

from __future__ import annotations

import numpy as np
import pytest

from assay.cli import main
from assay.corpus.errors import CorpusError
from assay.corpus.layout import MANIFEST
from assay.corpus.scores_folder import refuse_scores
from assay.corpus.storage import Store
from assay.engine.plan import find_corpora
from assay.recipe.recipe import load_recipe
from tests.small_scores import make_scores

VALUES = {"a": {"s": np.arange(4, dtype=np.float32)}}


@pytest.fixture
def theirs(tmp_path):
    """Another run's folder, and a link into it."""
    folder = make_scores(tmp_path / "theirs", VALUES)
    (tmp_path / "link").symlink_to(tmp_path / "theirs/scores/features")
    (tmp_path / "theirs/scores/features").mkdir()
    return folder


@pytest.mark.parametrize("output", ["theirs/scores", "theirs/scores/in/it", "link", "link/in"])
def test_an_output_lies_among_no_scores(theirs, tmp_path, output):
    with pytest.raises(CorpusError, match=r"lies among the scores .*theirs/scores; choose another output"):
        refuse_scores(Store.at(str(tmp_path / output)))


def test_what_makes_scores_may_do_so_again_and_the_folder_beside_is_free(theirs, tmp_path):
    refuse_scores(Store.at(theirs), itself=False)
    refuse_scores(Store.at(str(tmp_path / "theirs/out")))
    yet = Store.at(str(tmp_path / "yet"))
    with pytest.raises(CorpusError, match=r"lies among the scores .*/yet; choose"):
        refuse_scores(Store.at(str(tmp_path / "yet/in")), yet)
    with pytest.raises(CorpusError, match="lies among the scores"):
        refuse_scores(Store.at(f"{theirs}/again"), itself=False)


def test_elsewhere_than_here(theirs):
    store = Store.at("memory://bucket/deep/scores")
    store.write_text(MANIFEST, Store.at(theirs).read_text(MANIFEST))
    with pytest.raises(CorpusError, match="lies among the scores memory:///bucket/deep/scores"):
        refuse_scores(Store.at("memory://bucket/deep/scores/in/it"))
    refuse_scores(Store.at("memory://bucket/deep/other"))


@pytest.mark.parametrize(
    "command",
    [
        ["select", "{ours}", "--by", "s", "--top", "2", "--out", "{theirs}/out"],
        ["report", "{ours}", "--out", "{theirs}/page.html"],
        ["init", "{root}/data", "--out", "{theirs}/recipe.yaml"],
    ],
    ids=lambda command: command[0],
)
def test_no_command_writes_among_scores(theirs, tmp_path, capsys, command):
    ours = make_scores(tmp_path, VALUES)
    before = sorted((tmp_path / "theirs").rglob("*"))
    assert main([part.format(ours=ours, theirs=theirs, root=tmp_path) for part in command]) == 2
    assert "lies among the scores" in capsys.readouterr().err
    assert sorted((tmp_path / "theirs").rglob("*")) == before


def test_no_run_writes_among_scores(theirs, project):
    with pytest.raises(CorpusError, match="lies among the scores"):
        find_corpora(load_recipe(str(project.path), [f"output={theirs}/in"]))
