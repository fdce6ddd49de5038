"""MinHash: what a text is made of, in so few numbers that copies and near copies of it are found among millions.

Broder, "On the resemblance and containment of documents", 1997; the least hashes' lowest bits alone: Li & König,
0910.3349; 14 bands of 8 over 5-grams: FineWeb's (2406.17557).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from assay.methods.base import Column, Method, Need
from assay.methods.text_method import known_texts
from assay.ops import least_hashes, ngram_hashes
from assay.ops.minhash import MOST_COUNT, whole_hashes
from assay.ops.ngrams import check_settings
from assay.probe import Signals

MOST_ROWS = 8


class MinHash(Method):
    """Signatures of texts, by which ``curate.find_duplicates`` says how many earlier rows are like each row.

    Columns, of which none says anything about worth: ``minhash_text``, 64 bits of the text's tokens in their order as
    numbers of 24, 24 and 16 bits (words in lower case and runs of punctuation: blanks and capitals make no other text);
    ``minhash_signature``, the lowest 8 bits of each of bands · rows least hashes of its n-grams of ``shingle`` tokens.

    A text without a token, and what is no text, has NaN in both; a text of fewer tokens than ``shingle`` in the second.
    Two texts whose sets of n-grams have the Jaccard similarity J share a band with probability J^rows: with 14 bands of
    8 rows half of the pairs with J = .72 are compared, and 92 % of those with .8.

    Args:
        text_column: the raw column that holds the texts; None: ``text`` (in a recipe: the task's).
        shingle: how many tokens an n-gram has.
        bands, rows: how many bands, and how many least hashes are a band's, at most 8.
        seed: of the hashes.
        name: prefix of the columns.
    """

    gathers: ClassVar[int | None] = 0

    def __init__(
        self,
        text_column: str | None = None,
        *,
        shingle: int = 5,
        bands: int = 14,
        rows: int = 8,
        seed: int = 0,
        name: str = "minhash",
    ) -> None:
        check_settings(shingle, seed)
        if not 1 <= rows <= MOST_ROWS:
            raise ValueError(f"rows: expected a number of least hashes from 1 to {MOST_ROWS} for a band, got {rows}")
        if not 1 <= bands <= MOST_COUNT // rows:
            raise ValueError(f"bands: expected a number from 1 to {MOST_COUNT // rows} with rows={rows}, got {bands}")
        self.name = name
        self.text_column = "text" if text_column is None else text_column
        self.shingle, self.bands, self.rows, self.seed = shingle, bands, rows, seed

    @property
    def columns(self) -> Sequence[Column]:
        bits = f"{self.bands} bands of {self.rows} least hashes, 8 bits of each"
        return [
            Column(f"{self.name}_text", "none", "the text's hash: 24, 24 and 16 bits", 3),
            Column(f"{self.name}_signature", "none", bits, self.bands * self.rows),
        ]

    def needs(self) -> Mapping[str, Need]:
        return {"text": Need(raw=[self.text_column])}

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        texts = known_texts(signals["text"].raw[self.text_column])
        tokens = ngram_hashes(texts, 1, punctuation=True)
        whole = whole_hashes(tokens)
        parts = [whole >> np.uint64(40), whole >> np.uint64(16) & np.uint64(0xFFFFFF), whole & np.uint64(0xFFFF)]
        text = np.stack(parts, 1).astype(np.float32)
        text[np.diff(tokens.offsets) == 0] = np.nan
        shingles = ngram_hashes(texts, self.shingle, least=self.shingle, punctuation=True)
        least = least_hashes(shingles, self.bands * self.rows, seed=self.seed) & np.uint32(0xFF)
        signature = least.astype(np.float32)
        signature[np.diff(shingles.offsets) == 0] = np.nan
        return {f"{self.name}_text": torch.from_numpy(text), f"{self.name}_signature": torch.from_numpy(signature)}

    def metadata(self) -> dict[str, str]:
        return {"shingle": str(self.shingle), "bands": str(self.bands), "rows": str(self.rows)}
