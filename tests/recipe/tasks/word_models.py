"""Tiny random classifiers of texts on disk, with a tokenizer of words, and corpora for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from assay.recipe.recipe import load_recipe
from tests import small_architectures
from tests.small_models import byte_tokenizer

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = ["the", "ore", "holds", "gold", "and", "some", "of", "it", "is", "worth", "digging", "for", "not", "much"]
TEXTS = [
    "the ore holds gold",
    "gold",
    "not much of it is worth digging for and some is not",
    "some gold is worth some digging",
    "it is not the ore it is the gold",
]


def tokenizer(ends: bool, **options: Any) -> PreTrainedTokenizerFast:
    """A token per word; ``ends``: <s> and </s> around a text, and </s> between a pair's."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    own = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        around = [("<s>", 1), ("</s>", 2)]
        own.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=around
        )
    elif options.get("eos_token"):
        own.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", unk_token="<unk>", **options)


def save(
    path: Path, name: str, seed: int = 0, auto_class: str = "AutoModelForSequenceClassification", **changes: Any
) -> tuple[Any, Any]:
    """A random model of the architecture and its tokenizer, as transformers has them."""
    if name == "qwen2":  # transformers makes its tokenizer one of bytes
        model = small_architectures.save(
            path, name, auto_class, seed, vocab_size=260, max_position_embeddings=128, **changes
        )
        byte_tokenizer().save_pretrained(path)
        return model, AutoTokenizer.from_pretrained(path)
    changes = {"decoder_start_token_id": 0} | changes if name == "t5" else changes
    model = small_architectures.save(path, name, auto_class, seed, **changes)
    names = ["input_ids", "token_type_ids", "attention_mask"] if name == "bert" else ["input_ids", "attention_mask"]
    options = {"eos_token": "</s>"} if name in ("t5", "bart") else {}
    own = tokenizer(name in ("bert", "distilbert"), model_input_names=names, **options)
    own.save_pretrained(path)
    return model, AutoTokenizer.from_pretrained(path)


def write(root: Path, rows: list[dict[str, Any]] | pa.Table, name: str = "a.jsonl") -> None:
    """A shard of the corpus: JSON lines or Parquet, by its name."""
    path = root / "data" / name
    path.parent.mkdir(exist_ok=True)
    if name.endswith(".jsonl"):
        assert isinstance(rows, list)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), path)


def recipe(root: Path, task: dict[str, Any], models: dict[str, Any], **changes: Any) -> Any:
    """A recipe with grad_mimic's columns of the first model, or an ensemble of all, as the changes say."""
    data = {
        "version": 1,
        "corpus": {"path": "data"},
        "task": task,
        "models": {n: m if isinstance(m, dict) else {"kind": "transformers", "path": m} for n, m in models.items()},
        "methods": [{"method": "ensemble", "models": list(models)}],
        "output": "scores",
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(data | changes))
    return load_recipe(str(root / "recipe.yaml"))


def scores(root: Path, column: str, name: str = "a") -> list[float]:
    values: list[float] = pq.read_table(root / f"scores/{name}.parquet")[column].to_pylist()
    return values


def quarantine(root: Path, name: str = "a") -> dict[int, str]:
    """Row -> reason."""
    lines = (root / f"scores/quarantine/{name}.jsonl").read_text().splitlines()
    rows = map(json.loads, lines)  # those after one another with the same reason share a line
    return {i: row["reason"] for row in rows for i in range(row["row"], row.get("last", row["row"]) + 1)}
