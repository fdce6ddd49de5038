"""Causal language models from safetensors and GGUF files, whole or not at all.

transformers gets tensors and a private folder with copies of the small files that were looked at, never the
model's own folder: what lies there besides, or where a config points to, cannot be opened.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from assay._lazy import require
from assay.recipe.errors import EngineError
from assay.recipe.gguf_header import read_gguf
from assay.recipe.library_calls import Budget, quietly, refusing
from assay.recipe.model_files import (
    CONFIG,
    ModelFolder,
    Stored,
    check_counts,
    read_mapping,
    read_weights,
    shortened,
)

# Keys of a config that name code or files, choose kernels from elsewhere, or are about other tasks.
_DROPPED = {
    "auto_map",
    "custom_generate",
    "configuration_files",
    "transformers_weights",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "num_labels",
    "id2label",
    "label2id",
}


def load_folder(folder: ModelFolder) -> nn.Module:
    """The causal language model of a folder, in float32.

    Raises:
        EngineError: a file cannot be read or lies about another; a tensor is missing, left over, or of another
            shape than the config says.
    """
    config_file, stored = folder.full(CONFIG), read_weights(folder)
    values = read_config(folder, len(stored))
    budget = Budget(config_file, len(stored), sum(tensor.numbers for tensor in stored.values()))
    transformers = require("transformers", "text")
    with quietly():
        with refusing(f"{config_file}: transformers cannot load it"), staged({CONFIG: values}) as private:
            config = transformers.AutoConfig.from_pretrained(private, local_files_only=True, trust_remote_code=False)
            with torch.device("meta"), budget.enforced():
                skeleton = transformers.AutoModelForCausalLM.from_config(
                    copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False
                )
        _check_dtypes(folder, skeleton, stored)
        with refusing(f"{folder.path}: transformers cannot load its weights"):
            model, report = type(skeleton).from_pretrained(
                None,
                config=config,
                state_dict=_slices(folder),
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # they are in the report
                output_loading_info=True,
                local_files_only=True,
            )
    _check_report(folder.path, report)
    _check_duplicates(folder.path, model, stored)
    with refusing(f"{config_file}: transformers cannot tell which weights are tied"):
        _check_ties(config_file, model)
    return eval_mode(model)


def load_gguf(path: str) -> nn.Module:
    """The causal language model of a GGUF file, in float32. Raises as `load_folder` does."""
    header = read_gguf(path)
    check_counts(path, header.values, len(header.tensors))
    budget = Budget(path, len(header.tensors), sum(tensor.numbers for tensor in header.tensors.values()))
    transformers = require("transformers", "text")
    require("gguf", "text")
    refusals = refusing(f"{path}: transformers cannot load it")
    with staged({}, {"model.gguf": path}) as private, quietly(), refusals, budget.enforced():
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            private,
            gguf_file="model.gguf",
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    _check_report(path, report)
    return eval_mode(model)


def eval_mode(model: Any) -> nn.Module:
    module: nn.Module = model.eval()
    return module


def read_config(folder: ModelFolder, tensors: int) -> dict[str, Any]:
    """The folder's config.json without the keys that could lead out of it; its weights hold so many ``tensors``."""
    path = folder.full(CONFIG)
    values: dict[str, Any] = without(read_mapping(path), _DROPPED)
    if not isinstance(values.get("model_type"), str):
        raise EngineError(f"{path}: has no model_type; expected the name of an architecture, such as llama")
    quantised = values.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise EngineError(
            f"{path}: its weights are quantised ({shortened([str(method)])}); take the model before that, or GGUF"
        )
    check_counts(path, values, tensors)
    return values


def without(values: Any, dropped: Iterable[str]) -> Any:
    """JSON without some keys, at any depth."""
    if isinstance(values, dict):
        return {key: without(value, dropped) for key, value in values.items() if key not in dropped}
    return [without(value, dropped) for value in values] if isinstance(values, list) else values


@contextlib.contextmanager
def staged(written: Mapping[str, Any], linked: Mapping[str, str] | None = None) -> Iterator[str]:
    """A private folder with these JSON files, and links to these others."""
    with tempfile.TemporaryDirectory(prefix="assay-model-") as folder:
        for name, values in written.items():
            with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                json.dump(values, file)
        for name, path in (linked or {}).items():
            os.symlink(os.path.realpath(path), os.path.join(folder, name))
        yield folder


def _slices(folder: ModelFolder) -> dict[str, Any]:
    """Every tensor of the weights, not read yet."""
    safe_open: Callable[..., Any] = require("safetensors", "cli").safe_open
    slices: dict[str, Any] = {}
    for name in folder.weights:
        file = safe_open(folder.full(name), framework="pt", device="cpu")
        slices |= {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118 (no dict)
    return slices


def _check_report(path: str, report: Mapping[str, Any]) -> None:
    """What the library only warns of: random numbers in place of weights, or weights that it did not use."""
    other = [f"{name} {_shape(own)} for {_shape(wants)}" for name, own, wants in sorted(report["mismatched_keys"])]
    faults = [
        (sorted(report["missing_keys"]), "lack", "which its config wants"),
        (sorted(report["unexpected_keys"]), "hold", "which its config does not want"),
        (other, "hold", "the shape that its config wants"),
    ]
    said = "; ".join(f"{verb} {shortened(names)}, {why}" for names, verb, why in faults if names)
    if said:
        raise EngineError(f"{path}: the weights do not fit the config: they {said}")


def _shape(shape: Iterable[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


def _check_duplicates(path: str, model: Any, stored: Mapping[str, Stored]) -> None:
    """A tensor under two names that mean one parameter: with and without the base model's prefix."""
    prefix = f"{model.base_model_prefix}."
    twice = sorted(name for name in stored if name.startswith(prefix) and name.removeprefix(prefix) in stored)
    if twice:
        raise EngineError(f"{path}: the weights hold {shortened(twice)} twice, with and without {prefix!r}")


def _check_dtypes(folder: ModelFolder, skeleton: Any, stored: Mapping[str, Stored]) -> None:
    prefix = f"{skeleton.base_model_prefix}."
    parameters = {name.removeprefix(prefix) for name, _ in skeleton.named_parameters()}
    packed = sorted(n for n, t in stored.items() if not t.floating and n.removeprefix(prefix) in parameters)
    if packed:
        raise EngineError(
            f"{folder.path}: {shortened(packed)} hold no floating-point numbers of 16 bits or more; take the model "
            "before quantisation, or GGUF"
        )


def _check_ties(config_file: str, model: Any) -> None:
    """transformers does not tie what the file holds twice with different values; others do."""
    for name, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter(name) is not model.get_parameter(source):
            raise EngineError(
                f"{config_file}: says that {name} is {source} (tie_word_embeddings), but the weights hold two "
                "different tensors; set the key to what the model was trained with"
            )
