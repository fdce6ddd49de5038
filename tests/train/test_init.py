"""What `assay.train` gives, and what it says of a trainer that is not installed."""

from __future__ import annotations

import sys

import pytest

import assay


def test_lightning_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lightning"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "assay.train.lightning", raising=False)
    monkeypatch.delitem(vars(assay.train), "lightning", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'assay\[lightning\]'"):
        assay.train.lightning  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'lightening'"):
        assay.train.lightening  # noqa: B018
