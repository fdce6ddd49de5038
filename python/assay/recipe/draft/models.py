"""What kind of model lies at a path, from its config and its weights' headers. Nothing is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from assay.recipe.adapters import refuse_adapter
from assay.recipe.errors import EngineError
from assay.recipe.groups import matches
from assay.recipe.model_files import (
    ADAPTER_CONFIG,
    CONFIG,
    ModelFolder,
    find_model_folder,
    read_mapping,
    read_safetensors,
    read_weights,
    shortened,
)
from assay.recipe.model_labels import own_names
from assay.recipe.parts import is_pattern

# What transformers' class names end in, and what such a model can be scored on.
_HEADS = (
    (re.compile(r"For(CausalLM|ConditionalGeneration)$|LMHeadModel$"), "causal_lm"),
    (re.compile(r"ForSequenceClassification$"), "text classification"),
    (re.compile(r"ForTokenClassification$"), "token_classification"),
    (re.compile(r"ForImageClassification$"), "image classification"),
)
_TWO_TOWERS = re.compile(r"^(CLIP|ChineseCLIP|Siglip|AltCLIP|VisionTextDualEncoder|MetaClip)[A-Za-z0-9]*Model$")
_PEFT_TASKS = {"CAUSAL_LM": "causal_lm", "SEQ_CLS": "text classification", "TOKEN_CLS": "token_classification"}


@dataclass(frozen=True)
class ModelFacts:
    """What can be said of a model before it is loaded."""

    path: str
    kind: str
    """Of the recipe: transformers or mlp."""
    use: str
    """causal_lm, text classification, image classification, token_classification, contrastive, numbers, or unknown."""
    name: str
    """Its class, as its config has it."""
    outputs: int | None = None
    labels: tuple[str, ...] | None = None
    """The names of its classes in their order, where its config gives them names of their own."""
    regression: bool = False
    chat: bool = False
    positions: int | None = None
    shapes: Mapping[str, tuple[int, ...]] | None = None
    """Its tensors; None of a .gguf file or an adapter."""
    adapter: str | None = None
    """The adapter's folder; ``path`` is then its base model's."""
    several: bool = False
    """Whether ``path`` is a glob, of whose models the others are facts of one."""


def model_facts(path: str) -> ModelFacts:
    """Look at a folder of transformers, an adapter, a .gguf file, or a safetensors file of linear layers.

    Raises:
        EngineError: there is no such thing, or its files are not what they say.
    """
    if is_pattern(path) and not os.path.exists(path):
        return _facts_of_several(path)
    if not os.path.exists(path):
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", path)
        hint = f"; assay downloads nothing: fetch it with `hf download {path} --local-dir …`" if hub else ""
        raise EngineError(f"{path}: no such file or folder{hint}")
    if os.path.isfile(path):
        return _file_facts(path)
    folder = find_model_folder(path)
    if folder.config == ADAPTER_CONFIG:
        return _adapter_facts(folder)
    return _folder_facts(folder, {name: tensor.shape for name, tensor in read_weights(folder).items()})


def _facts_of_several(pattern: str) -> ModelFacts:
    """What the models of a glob have in common. EngineError if it is not what they are for."""
    found = [model_facts(path) for path in matches(pattern)]
    if not found:
        raise EngineError(f"{pattern}: matches no model")
    first = found[0]
    for other in found[1:]:
        if _kind_of(other) != _kind_of(first):
            raise EngineError(f"{pattern}: {first.path} is {first.name}, {other.path} {other.name}; expected one kind")
    shared = replace(first, name=f"{len(found)} × {first.name}", chat=all(f.chat for f in found), several=True)
    if first.adapter is None:
        return replace(shared, path=pattern)
    if bases := sorted({facts.path for facts in found} - {first.path}):
        raise EngineError(f"{pattern}: are adapters of {first.path} and of {bases[0]}; expected those of one model")
    return replace(shared, adapter=pattern)


def _kind_of(facts: ModelFacts) -> tuple[object, ...]:
    """What models that are scored together have in common."""
    return facts.kind, facts.use, facts.regression, facts.outputs, facts.labels, facts.adapter is None


def _file_facts(path: str) -> ModelFacts:
    if path.endswith(".gguf"):
        return ModelFacts(path, "transformers", "causal_lm", "GGUF")
    shapes = {name: tensor.shape for name, tensor in read_safetensors(path).items()}
    weights = [(int(m[1]), shapes[name]) for name in shapes if (m := re.fullmatch(r"(\d{1,6})\.weight", name))]
    if not weights or len(max(weights)[1]) != 2:
        raise EngineError(f"{path}: no linear layers (0.weight, 2.weight, …); expected those, a folder, or .gguf")
    outputs = max(weights)[1][0]
    return ModelFacts(path, "mlp", "numbers", "mlp", outputs, regression=outputs == 1, shapes=shapes)


def _adapter_facts(folder: ModelFolder) -> ModelFacts:
    settings = read_mapping(folder.full(folder.config))
    named = settings.get("base_model_name_or_path")
    found = [os.path.join(folder.path, named), named] if isinstance(named, str) and "\0" not in named else []
    base = next((path for path in found if os.path.isdir(path)), None)
    if base is None:
        said = f" of {shortened([str(named)])}, which is no folder here" if named else ""
        raise EngineError(
            f"{folder.path}: is a LoRA adapter{said}; write the recipe's model by hand: its base model as path, this "
            "folder as adapter"
        )
    whole = find_model_folder(base)
    refuse_adapter(whole)
    facts = _folder_facts(whole, None)
    use = _PEFT_TASKS.get(str(settings.get("task_type")), facts.use)
    name, chat = f"an adapter of {facts.name}", facts.chat or _has_chat_template(folder)
    return replace(facts, adapter=folder.path, use=use, name=name, chat=chat)


def _folder_facts(folder: ModelFolder, shapes: Mapping[str, tuple[int, ...]] | None) -> ModelFacts:
    config = read_mapping(folder.full(CONFIG))
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    use = next((use for pattern, use in _HEADS if pattern.search(name)), "unknown")
    if _TWO_TOWERS.fullmatch(name):
        use = "contrastive"
    if use == "causal_lm" and config.get("is_encoder_decoder"):
        use = "unknown"
    if config.get("problem_type") == "multi_label_classification":
        use, name = "unknown", f"{name} of several labels a sample"
    labels, number = config.get("id2label"), config.get("num_labels")
    outputs = len(labels) if isinstance(labels, dict) else number if type(number) is int else None
    if outputs is None and use.endswith("classification"):
        outputs = 2  # transformers' own default
    regression = config.get("problem_type") == "regression" or (use == "text classification" and outputs == 1)
    return ModelFacts(
        folder.path,
        "transformers",
        use,
        name[:80] or str(config.get("model_type"))[:80],
        outputs,
        _names(labels),
        regression,
        _has_chat_template(folder),
        _positions(config),
        shapes,
    )


def _names(labels: Any) -> tuple[str, ...] | None:
    """id2label in order; None if it has transformers' own LABEL_0, LABEL_1, … or is none."""
    if not isinstance(labels, dict) or labels.keys() != {str(i) for i in range(len(labels))}:
        return None
    return own_names([str(labels[str(i)]) for i in range(len(labels))])


def _positions(config: Mapping[str, Any]) -> int | None:
    text = config.get("text_config")
    for values in (config, text if isinstance(text, dict) else {}):
        for key in ("max_position_embeddings", "n_positions"):
            if type(values.get(key)) is int and values[key] > 1:
                return int(values[key])
    return None


def _has_chat_template(folder: ModelFolder) -> bool:
    if any(name.startswith("chat_template") for name in folder.tokenizer):
        return True
    settings = "tokenizer_config.json"
    return settings in folder.tokenizer and bool(read_mapping(folder.full(settings)).get("chat_template"))
