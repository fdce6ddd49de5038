"""Tiny random language models on disk: 32 wide, 2 layers, a byte-level tokenizer of 257 tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

TEXTS = [
    "The ore holds gold, and some of it is worth digging for.",
    "Not all that glitters is gold.",
    "A vein runs north for two miles before it thins out.",
    "Assay first; dig later.",
    "Mercury was used to part the gold from the sand.",
    "Nobody knows how much is left in the old shaft.",
    "Gold!",
    "The river carried grains of it down to the plain.",
]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 257}


def llama_config(**changes: Any) -> LlamaConfig:
    sizes = SIZES | {"intermediate_size": 64, "max_position_embeddings": 128, "bos_token_id": 256, "eos_token_id": 256}
    return LlamaConfig(**(sizes | changes))


def byte_tokenizer(*more: str, bos: bool = False, **options: Any) -> PreTrainedTokenizerFast:
    """One token per byte, ``<eos>`` and ``more``."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={b: i for i, b in enumerate(bytes_)} | {"<eos>": 256}, merges=[]))
    tokenizer.add_tokens([AddedToken(token, special=True) for token in more])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **options)


def save_model(path: Path, seed: int = 0, config: Any = None, tokenizer: Any = None, **options: Any) -> Path:
    """A random model whose logits are not small, so that a difference shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or llama_config(), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path, **options)
    (tokenizer or byte_tokenizer()).save_pretrained(path)
    return path


def edit_json(path: Path, **changes: Any) -> None:
    """Replace keys of a JSON file; ... removes one."""
    data = json.loads(path.read_text())
    data.update(changes)
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a safetensors file in place."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def write_recipe(root: Path, models: dict[str, Any], **changes: Any) -> Path:
    """A recipe that scores TEXTS with an ensemble of these models."""
    (root / "data").mkdir(exist_ok=True)
    (root / "data/a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    recipe = {
        "version": 1,
        "corpus": {"path": "data"},
        "task": {"kind": "causal_lm", "max_length": 32},
        "models": {
            n: m if isinstance(m, dict) else {"kind": "transformers", "path": str(m)} for n, m in models.items()
        },
        "methods": [{"method": "ensemble", "models": list(models)}],
        "output": "scores",
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe | changes, sort_keys=False))
    return root / "recipe.yaml"
