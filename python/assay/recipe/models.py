"""The models of a recipe: how each kind is built, and what identifies it.

None of it can run a stranger's code: weights come as safetensors or GGUF, never as pickles; nothing is
downloaded; a checkpoint's own Python never runs.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from assay._lazy import require
from assay.corpus.storage import sha256
from assay.recipe.errors import EngineError
from assay.recipe.parts import ExistingPath, Part, Registry

# What can change a score: weights, shapes, tokens. A README or a training log cannot.
_MODEL_FILES = (".safetensors", ".gguf", ".json", ".txt", ".model")


class ModelSpec(Part):
    """One model of a recipe. Subclass it, and register the subclass, to bring models of your own."""

    kind: str
    path: ExistingPath

    def build(self) -> nn.Module:
        """Load the model."""
        raise NotImplementedError

    def tokenizer(self) -> Any | None:
        """The model's own tokenizer, for models of text."""
        return None

    def input_size(self, model: nn.Module) -> int | None:
        """How many numbers one input has, if the model tells."""
        return None

    def output_size(self, model: nn.Module) -> int | None:
        """How many logits one input gives, if the model tells."""
        return None

    def identity(self) -> dict[str, Any]:
        """The parameters that change scores; where the files lie is not among them."""
        return self.model_dump(exclude={"path"})

    def fingerprint(self) -> str:
        """SHA-256 of the contents of the model's files."""
        if os.path.isfile(self.path):
            return f"sha256:{file_sha256(self.path)}"
        digest = hashlib.sha256()
        for name in sorted(os.listdir(self.path)):
            full = os.path.join(self.path, name)
            if name.endswith(_MODEL_FILES) and os.path.isfile(full):
                digest.update(f"{name}\0{file_sha256(full)}\n".encode())
        return f"sha256:{digest.hexdigest()}"


MODELS: Registry[ModelSpec] = Registry("kind", "assay.models")
register_model = MODELS.register


@MODELS.add("mlp")
class MlpSpec(ModelSpec):
    """Linear layers with ReLU between them, from one safetensors file.

    Its tensors are ``0.weight``, ``0.bias``, ``2.weight``, … as `nn.Sequential` names them (the ReLUs are 1,
    3, …); the sizes are read off the weights.
    """

    kind: Literal["mlp"]

    def build(self) -> nn.Module:
        try:
            tensors: dict[str, torch.Tensor] = require("safetensors.torch", "cli").load_file(self.path)
        except Exception as error:  # safetensors' error type lives in its native module
            raise EngineError(f"{self.path}: not a safetensors file ({_one_line(error)})") from error
        indices = sorted(int(m[1]) for m in map(re.compile(r"(\d+)\.weight").fullmatch, tensors) if m)
        expected = {f"{i}.{kind}" for i in range(0, 2 * len(indices), 2) for kind in ("weight", "bias")}
        if not indices or set(tensors) - expected or indices != list(range(0, 2 * len(indices), 2)):
            raise EngineError(
                f"{self.path}: holds {', '.join(sorted(tensors)[:6])}; expected 0.weight, 0.bias, 2.weight, "
                "…: linear layers with a ReLU between each two"
            )
        layers: list[nn.Module] = []
        for i in indices:
            weight, bias = tensors[f"{i}.weight"], tensors.get(f"{i}.bias")
            if weight.ndim != 2 or (layers and layers[-2].out_features != weight.shape[1]):
                raise EngineError(f"{self.path}: {i}.weight of shape {tuple(weight.shape)} does not fit the one before")
            layers += [nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None), nn.ReLU()]
        model = nn.Sequential(*layers[:-1])
        model.load_state_dict(tensors)
        return model.eval()

    def input_size(self, model: nn.Module) -> int | None:
        return int(next(model.parameters()).shape[1])

    def output_size(self, model: nn.Module) -> int | None:
        *_, weight = (p for p in model.parameters() if p.ndim == 2)
        return int(weight.shape[0])


@MODELS.add("transformers")
class TransformersSpec(ModelSpec):
    """A Hugging Face causal language model: a folder with safetensors, or one ``.gguf`` file, in float32."""

    kind: Literal["transformers"]

    def build(self) -> nn.Module:
        transformers = require("transformers", "text")
        model: nn.Module = self._load(transformers.AutoModelForCausalLM, dtype=torch.float32, **self._weights())
        return model.eval()

    def tokenizer(self) -> Any:
        return self._load(require("transformers", "text").AutoTokenizer)

    def _weights(self) -> dict[str, Any]:
        return {} if self._is_gguf else {"use_safetensors": True}

    @property
    def _is_gguf(self) -> bool:
        return self.path.endswith(".gguf")

    def _load(self, factory: Any, **options: Any) -> Any:
        folder = self.path
        if self._is_gguf:
            require("gguf", "text")
            folder, options["gguf_file"] = os.path.split(self.path)
        elif not os.path.isdir(folder):
            raise EngineError(f"{self.path}: expected a folder with safetensors, or a .gguf file")
        try:
            return factory.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise EngineError(f"{self.path}: transformers cannot load it ({_one_line(error)})") from error


def shared_tokenizer(specs: Mapping[str, ModelSpec]) -> Any:
    """The one tokenizer of a text recipe's models: unless they agree, a token means different things."""
    found = [(name, own) for name, spec in specs.items() if (own := spec.tokenizer()) is not None]
    if not found:
        raise EngineError("none of the recipe's models has a tokenizer; a causal_lm task needs one")
    first, tokenizer = found[0]
    for name, other in found[1:]:
        if other.get_vocab() != tokenizer.get_vocab():
            raise EngineError(f"models.{first} and models.{name} have different vocabularies; score them separately")
    return tokenizer


def file_sha256(path: str) -> str:
    status = os.stat(path)
    return _cached_sha256(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _cached_sha256(path: str, size: int, mtime_ns: int) -> str:
    """Large weights are read once per process, unless they change."""
    with open(path, "rb") as file:
        return sha256(file)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
