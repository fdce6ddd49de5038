"""Does ``assay prove`` pass what helps and refuse the rest? ``python -m benchmarks.quality.prove [digits] [text]``.

Two corpora, each through the recipe and the function that the command calls:

- *digits*: scikit-learn's, 30 % of the labels wrong, a fresh 64–128–10 network to train. ``mimic`` and an ensemble's
  loss should pass; the entropy of the ensemble's prediction, low or high, knows nothing of labels.
- *text*: the multiplier's mixture, of which 8 % are docstrings of the standard library, and a byte-level Llama of 0.2 M
  parameters that is to be good at docstrings of other modules; the best tenth is kept. ``dsir`` and ``bm25`` know the
  target; the entropy of a model of the same shape, trained for a while on the mixture, does not.

JSON in benchmarks/results.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

from assay.curate import Proof
from assay.recipe import load_recipe
from assay.two_stage import Comparison, Cost, Trainee, Training, prove
from benchmarks import options, timing
from benchmarks.quality.multiplier import corpus

NOISE, HELD_OUT, TRUSTED = 0.3, 397, 200
Setting = tuple[Path, str, Comparison, Training]


def digits(root: Path) -> Setting:
    """The recipe's path, the model to train, what is tried out, and how."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(0)
    x, y = load_digits(return_X_y=True)
    order = rng.permutation(len(x))
    x, y = (x[order] / 16).astype(np.float32), y[order]
    rest = slice(HELD_OUT + TRUSTED, None)
    given = y[rest].copy()
    wrong = rng.random(len(given)) < NOISE
    given[wrong] = (given[wrong] + rng.integers(1, 10, wrong.sum())) % 10
    for folder, own, labels in (("corpus", x[rest], given), ("held-out", x[:HELD_OUT], y[:HELD_OUT])):
        (root / folder).mkdir()
        table = pa.table({"pixels": list(own), "label": labels.astype(np.int64)})
        pq.write_table(table, root / folder / "a.parquet")
    starts = {name: _mlp(i) for i, name in enumerate(("fresh", "model", "other"))}
    trusted = slice(HELD_OUT, HELD_OUT + TRUSTED)
    reference = _mlp(1)
    _fit(reference, x[trusted], y[trusted], 400)
    for name in ("model", "other"):
        _fit(starts[name], x[rest], given, 2 * len(given) // 32)
    for name, model in {**starts, "reference": reference}.items():
        save_file(model.state_dict(), root / f"{name}.safetensors")
    recipe = {
        "task": {"kind": "classification", "input_column": "pixels", "label_column": "label", "classes": 10},
        "models": {n: {"kind": "mlp", "path": f"{n}.safetensors"} for n in ("fresh", "model", "other", "reference")},
        "methods": [
            {"method": "grad_mimic", "model": "model", "reference": "reference"},
            {"method": "ensemble", "models": ["model", "other"]},
        ],
    }
    keep = {"ensemble_entropy": "low", "ensemble_mutual_information": "high"}
    comparison = Comparison(["mimic", "ensemble_nll", *keep], top=0.6, pools=8, keep=keep)  # type: ignore[arg-type]
    return _recipe(root, recipe), "fresh", comparison, Training(300, 32, 3e-3, evaluations=1)


def _mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def _fit(model: nn.Module, x: Any, y: Any, steps: int) -> None:
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for i in _batches(len(inputs), 32, steps):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[i]), labels[i]).backward()
        optimizer.step()


def _batches(rows: int, size: int, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(rows, (size,), generator=generator) for _ in range(steps)]


def text(root: Path) -> Setting:
    from tests.small_models import byte_tokenizer, llama_config

    data, texts = corpus.build(8000, 400, 200, 16, 0), {}
    for folder, pieces in (("corpus", data.pool), ("held-out", data.validation), ("docstrings", data.target)):
        (root / folder).mkdir()
        texts[folder] = [bytes(piece).decode(errors="replace") for piece in pieces.to(torch.uint8).numpy()]
        pq.write_table(pa.table({"text": texts[folder]}), root / folder / "a.parquet")
    # The ids that scoring will see; a piece that cuts a character at its edge has more of them, and is left out.
    tokens = byte_tokenizer()(texts["corpus"])["input_ids"]
    pool = torch.tensor([ids for ids in tokens if len(ids) == data.pool.shape[1]])
    from transformers import AutoModelForCausalLM

    config = llama_config(hidden_size=96, intermediate_size=256, num_hidden_layers=2, max_position_embeddings=256)
    for name, steps in (("fresh", 0), ("small", 400)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for i in _batches(len(pool), 16, steps):
            optimizer.zero_grad()
            model(input_ids=pool[i], labels=pool[i]).loss.backward()
            optimizer.step()
        model.save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    recipe = {
        "task": {"kind": "causal_lm", "text_column": "text", "max_length": 128},
        "models": {name: {"kind": "transformers", "path": name} for name in ("fresh", "small")},
        "targets": {"docstrings": {"path": "docstrings"}},
        "methods": [
            {"method": "dsir", "targets": ["docstrings"]},
            {"method": "bm25", "targets": ["docstrings"]},
            {"method": "ensemble", "models": ["small"]},
        ],
    }
    path = _recipe(root, recipe)
    comparison = Comparison(["dsir", "ensemble_entropy"], top=0.1, pools=8, keep={"ensemble_entropy": "low"})
    return path, "fresh", comparison, Training(60, 16, 3e-3, evaluations=1)


def _recipe(root: Path, own: dict[str, Any]) -> Path:
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "corpus": {"path": "corpus"}, **own, "output": "scores"}))
    return path


def tried(make: Callable[[Path], Setting]) -> tuple[Proof, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        path, model, comparison, training = make(root)
        costs: list[Cost] = []
        began = time.perf_counter()
        trainee = Trainee(model, str(root / "held-out"))
        proof = prove(load_recipe(path), trainee, comparison, str(root / "proof"), training, on_cost=costs.append)
        seconds = time.perf_counter() - began
    return proof, {"trainings": costs[0].trainings, "predicted_seconds": costs[0].seconds, "seconds": seconds}


def main() -> None:
    makers = {"digits": digits, "text": text}
    cases = []
    for name in options.some(__doc__, "CORPUS", makers):
        proof, cost = tried(makers[name])
        title = (
            f"{name}: {cost['trainings']} trainings, {cost['seconds']:.0f} s, {cost['predicted_seconds']:.0f} foretold"
        )
        table = Table("score", "over", "held-out loss lower by", "95 %", "", title=title)
        for score, claim in proof.claims.items():
            for control, gain in claim.gains.items():
                sure = f"{gain.low:+.4f} to {gain.high:+.4f}"
                table.add_row(score, control, f"{gain.estimate:+.4f}", sure, "proved" if claim.proved else "refused")
        Console(width=110).print(table)
        cases.append({"corpus": name, **cost, **proof.model_dump()})
    print("written to", timing.write("prove", cases).relative_to(timing.RESULTS.parent.parent))


if __name__ == "__main__":
    main()
