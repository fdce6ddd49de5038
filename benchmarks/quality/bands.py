"""Which band of a reference's perplexity is worth training on? ``python -m benchmarks.quality.bands [--quick]``.

The multiplier's mixture of real text in pieces of 128 characters. A byte-level Llama (2 layers, 64 wide) is trained on
a fifth of it and scores the rest by a recipe; half of that is kept by the condition of each band of 2405.20541, as
``assay select --where`` has it: the low half, the middle one, the high one. A model of the same shape is trained from
scratch on what is kept, for as many steps, beside those trained on a random half and on everything. Nats per character
of held-out text of the mixture and of docstrings, and what of the kept is junk. Four seeds draw everything anew.

- as it is: the mixture.
- with junk: a third of the pieces, of the reference's too, are spoilt: their words shuffled, one line of them repeated,
  or random characters in their place; what is held out is not. A random half of the others stands beside.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from torch import Tensor

from assay.curate import RuleOptions, curate
from assay.demo.text import KINDS
from assay.engine import run
from assay.recipe import load_recipe
from benchmarks import options
from benchmarks.quality.multiplier import corpus
from benchmarks.quality.multiplier.model import Schedule, loss, train
from benchmarks.quality.worth import Numbers, experiment

SEEDS = 4
POOL, FOR_REFERENCE, HELD_OUT = 3200, 800, 256  # pieces
JUNK = 1 / 3
SCORE = "ensemble_mean_nll"
BANDS = {
    "low half": f"percent_rank({SCORE}) <= 0.5",
    "middle half": f"percent_rank({SCORE}) between 0.25 and 0.75",
    "high half": f"percent_rank({SCORE}) >= 0.5",
}
TRAINING = Schedule(steps=300)

Rows = npt.NDArray[np.int64]


def texts_of(pieces: Tensor) -> list[str]:
    """A character to a byte: what is not ASCII is a question mark."""
    return [bytes(row).decode() for row in pieces.where(pieces < 128, ord("?")).to(torch.uint8).numpy()]


def random_characters(text: str, rng: np.random.Generator) -> str:
    return bytes(rng.integers(32, 127, len(text)).astype(np.uint8)).decode()


SPOIL = {"shuffled": KINDS["shuffled"], "repeated": KINDS["repeated"], "random": random_characters}


def spoilt(texts: Sequence[str], share: float, seed: int) -> tuple[list[str], npt.NDArray[np.str_]]:
    """Texts of as many characters, a share of which are junk, and what each is: "clean" or the kind of junk."""
    rng = np.random.default_rng(seed)
    kinds = np.where(rng.random(len(texts)) < share, rng.choice(list(SPOIL), len(texts)), "clean")
    own = [text if kind == "clean" else SPOIL[kind](text, rng) for text, kind in zip(texts, kinds, strict=True)]
    # Words that are joined by single spaces are shorter than they were: such a text begins again at its end. Without a
    # word it stays as it is.
    return ["".join(islice(cycle(new or old), len(old))) for old, new in zip(texts, own, strict=True)], kinds


def make_model(seed: int) -> Any:
    from tests.small_models import llama_config
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "use_cache": False}
    return AutoModelForCausalLM.from_config(llama_config(**shape), dtype=torch.float32)


def banded(texts: Sequence[str], reference: Any, tokenizer: Any, root: Path) -> dict[str, Rows]:
    """By band the places of the texts that are kept: a recipe scores them, a condition selects."""
    (root / "corpus").mkdir()
    pq.write_table(pa.table({"text": texts, "place": range(len(texts))}), root / "corpus/a.parquet")
    for part in (reference, tokenizer):
        part.save_pretrained(root / "reference")
    recipe = {
        "version": 1,
        "corpus": {"path": "corpus"},
        "task": {"kind": "causal_lm", "text_column": "text", "max_length": 128},
        "models": {"reference": {"kind": "transformers", "path": "reference"}},
        "methods": [{"method": "ensemble", "models": ["reference"]}],
        "output": "scores",
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    summary = run(load_recipe(root / "recipe.yaml"))
    assert summary.clean, summary.lines()
    kept = {}
    for name, where in BANDS.items():
        curate(str(root / "scores"), None, RuleOptions(where=where).rule(), str(root / name), where=where)
        kept[name] = pq.read_table(root / name / "a.parquet")["place"].to_numpy()
    return kept


def chosen(texts: Sequence[str], kinds: npt.NDArray[np.str_], bands: Mapping[str, Rows], seed: int) -> dict[str, Rows]:
    """The bands, and their controls."""
    rng, half = np.random.default_rng(seed), len(texts) // 2
    rows = dict(bands) | {"random half (control)": rng.permutation(len(texts))[:half]}
    if (kinds != "clean").any():
        rows["random half of the clean (control)"] = rng.permutation(np.flatnonzero(kinds == "clean"))[:half]
    return rows | {"all (control)": np.arange(len(texts))}


def one_seed(share: float, seed: int) -> Numbers:
    from tests.small_models import byte_tokenizer

    data, tokenizer = corpus.build(POOL + FOR_REFERENCE + HELD_OUT, 16, 16, HELD_OUT, seed), byte_tokenizer()

    def ids(texts: Sequence[str]) -> Tensor:
        found: Tensor = tokenizer(list(texts), return_tensors="pt")["input_ids"]
        return found

    pool, first, mixture = data.pool.split([POOL, FOR_REFERENCE, HELD_OUT])
    held_out = {"mixture": ids(texts_of(mixture)), "docstrings": ids(texts_of(data.test))}
    texts, kinds = spoilt(texts_of(pool), share, seed)
    learnt, reference = ids(spoilt(texts_of(first), share, seed + 1000)[0]), make_model(seed)
    train(reference, learnt, TRAINING, seed, learnt[:1], TRAINING.steps)
    with tempfile.TemporaryDirectory() as folder:
        bands = banded(texts, reference.eval(), tokenizer, Path(folder))
    numbers = {}
    for name, rows in chosen(texts, kinds, bands, seed).items():
        model = make_model(seed + 1)
        train(model, ids([texts[i] for i in rows]), TRAINING, seed, learnt[:1], TRAINING.steps)
        own = {kind: float((kinds[rows] == kind).mean()) for kind in SPOIL} if share else {}
        numbers[name] = {kind: loss(model, x) for kind, x in held_out.items()} | own
    return numbers


def main() -> None:
    parts = {"as it is": (partial(one_seed, 0.0), SEEDS), "with junk": (partial(one_seed, JUNK), SEEDS)}
    experiment("bands", parts, options.quick(__doc__))


if __name__ == "__main__":
    main()
