"""The journal is the rows that came, however many waited, saved in between or not."""

from __future__ import annotations

import pytest
import torch

from assay.methods import Column
from assay.train import journal


@pytest.mark.parametrize("waiting", [1, 5, 1 << 16])
def test_rows_come_back_in_their_order(waiting, monkeypatch) -> None:
    monkeypatch.setattr(journal, "WAITING", waiting)
    columns = [Column("a", "high", "a score")]
    whole = journal.Journal(columns)
    assert whole.has_ids is None
    for step in range(1, 6):
        if step == 3:
            before, whole = whole, journal.Journal(columns)
            whole.load_state_dict(before.state_dict())
        assert whole.has_ids is (None if step == 1 else True)
        whole.add([f"{step}-{i}" for i in range(3)], step, {"a": torch.arange(3.0) + step})
    table = whole.table()
    assert table["id"].to_pylist() == [f"{step}-{i}" for step in range(1, 6) for i in range(3)]
    assert table["step"].to_pylist() == [step for step in range(1, 6) for _ in range(3)]
    assert table["a"].to_pylist() == [float(step + i) for step in range(1, 6) for i in range(3)]


def test_without_ids() -> None:
    rows = journal.Journal([])
    rows.add(None, 1, {"weight": torch.ones(2)})
    assert rows.has_ids is False
    assert rows.table()["id"].to_pylist() == [None, None]
