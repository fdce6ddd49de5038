"""The benchmark of texts, at its smallest."""

from __future__ import annotations

import pytest

from benchmarks import hashing


def test_every_row_is_measured_on_every_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "PART", 1 << 12)
    texts = [f"def f{i}(x): return x + {i}  # word{i % 7} and others\n".encode() * 5 for i in range(60)]
    assert b"".join(bytes(text) for part in hashing.parts_of(texts) for text in part.to_pylist()) == b"".join(texts)
    measured = hashing.measure(hashing.rows(texts), ["scalar"], rounds=1)
    assert {row["row"] for row in measured if row["contract"]} > {"hashes of words", "hashes of 1-2-grams"}
    assert all(row["scalar"]["median"] > 0 for row in measured)
