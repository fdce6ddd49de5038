"""Common architectures, each with every parameter or with names of what is left out."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from benchmarks.coverage import CASES, cover

GATHERS = {"JetMoE": "_linear.weight", "Switch encoder": ".experts."}
"""Mixtures whose experts are layers that are given the tokens of all samples, in an order of the mixture's own."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_parameter_is_tapped_exactly_or_named(name: str) -> None:
    found = cover(CASES[name]())
    assert found.error < 1e-4
    if name in GATHERS:
        assert found.left_out
        assert all(GATHERS[name] in parameter for parameter in found.left_out)
    else:
        assert found.share == 1
        assert not found.left_out


@pytest.mark.parametrize("name", ["OPT", "Swin", "ConvNeXt", "HuBERT", "Longformer"])
def test_some_of_them(name: str) -> None:
    """A subclass of an embedding, windows, a norm of channels, a computed weight, the batch second."""
    found = cover(CASES[name]())
    assert found.share == 1
    assert found.error < 1e-4
