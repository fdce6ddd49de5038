"""Mutated bytes are rows or a documented error; `python -m tests.fuzz` goes further."""

from __future__ import annotations

import pytest

from assay.recipe import load_recipe
from assay.recipe.errors import RecipeError
from tests.fuzz import KINDS, Kind, attempt, mutations


@pytest.mark.parametrize("name", KINDS)
def test_mutated_bytes_are_read_or_refused(name, tmp_path):
    kind = KINDS[name]
    seeds = kind.seeds()
    assert attempt(kind, seeds[0], tmp_path)
    for content in mutations(seeds, 60, seed=0):
        attempt(kind, content, tmp_path)


def test_an_error_that_is_not_documented_is_raised(tmp_path):
    def read(content, folder):
        raise KeyError(content)

    with pytest.raises(KeyError):
        attempt(Kind(lambda: [b"a"], read, (ValueError,)), b"a", tmp_path)


@pytest.mark.parametrize("content", [b"[" * 5000, b"seed: 2001-99-99", b"a: &a [*a, *a]", b"\xff", b"? [1]\n: 2"])
def test_a_recipe_of_odd_yaml_is_refused_in_one_line(content, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert "\n" not in str(caught.value)
