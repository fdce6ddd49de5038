"""A corpus with wrong labels, scored by a model that knows better."""

from __future__ import annotations

import pytest

from assay.recipe import load_recipe
from tests.two_stage.noisy_labels import make_noisy_labels


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("two-stage")
    make_noisy_labels(root)
    return root


@pytest.fixture
def recipe(root, tmp_path):
    return load_recipe(str(root / "recipe.yaml"), [f"output={tmp_path / 'scores'}"])
