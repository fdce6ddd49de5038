"""LoRA adapters as peft saves them, put into their base model."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from assay._lazy import require
from assay.recipe.checkpoints import Wanted, check_finite, eval_mode, load_folder, staged
from assay.recipe.errors import EngineError
from assay.recipe.library_calls import quietly, refusing
from assay.recipe.model_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    ModelFolder,
    Stored,
    find_model_folder,
    read_mapping,
    read_weights,
    refuse_packed,
    shortened,
)

# What peft is told. Everything else that is set and not idle could change what the adapter computes, or run code.
_TOLD = {
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "bias",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
}
# Where it comes from, how it was trained, and settings of what is refused. Which layers it adapts, its weights say.
_IDLE = {
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "runtime_config",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
}
# Those that leave the base model's weights as they are.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
_MAX_WAYS = 1000  # to match a pattern
_KEY = re.compile(r"base_model\.model\.(?P<module>.+?)\.(lora_|modules_to_save\b)")


Train = Literal["adapter", "all"]


def find_adapter(path: str) -> ModelFolder:
    """The folder of an adapter. EngineError if it is none."""
    folder = find_model_folder(path)
    if folder.config != ADAPTER_CONFIG:
        raise EngineError(f"{path}: no {ADAPTER_CONFIG} in it; expected the folder of a LoRA adapter that peft saved")
    return folder


def refuse_adapter(folder: ModelFolder) -> None:
    """EngineError if a whole model's folder is an adapter's."""
    if folder.config == ADAPTER_CONFIG:
        named = read_mapping(folder.full(ADAPTER_CONFIG)).get("base_model_name_or_path")
        hint = f" (its config names {shortened([named])})" if isinstance(named, str) and named else ""
        raise EngineError(
            f"{folder.path}: is a LoRA adapter; give its base model{hint} as path, and this folder as adapter"
        )


def load_adapter(folder: ModelFolder, base: ModelFolder, wanted: Wanted, train: Train) -> nn.Module:
    """The base model with the adapter in it: the adapter's parameters train, the others are frozen; or ``all`` train.

    A head that the base model lacks may be the adapter's (peft's ``modules_to_save``).

    Raises:
        EngineError: as `load_folder`; or the adapter is not LoRA, or does not fit the base model.
    """
    path, stored = folder.full(ADAPTER_CONFIG), read_weights(folder)
    values = _lora_values(path, stored)
    peft = require("peft", "text")
    whole = {_own_name(name): tensor for name, tensor in stored.items() if ".lora_" not in name}
    model: Any = load_folder(base, wanted, whole)
    weights = require("safetensors.torch", "cli").load_file(folder.full(ADAPTER_WEIGHTS))
    with quietly(), refusing(f"{folder.path}: peft cannot put the adapter into {base.path}"):
        with staged({ADAPTER_CONFIG: values}) as private:
            config = peft.PeftConfig.from_pretrained(private)
        config.inference_mode = False
        peft.inject_adapter_in_model(config, model)
        # Without the wrapper that peft saves from: the model stays of its own class, and so do its layers' names.
        own = {_own_name(name): tensor for name, tensor in weights.items()}
        result = peft.set_peft_model_state_dict(model, own)
    missing = [name for name in result.missing_keys if ".default" in name]
    for names, verb in ((missing, "lacks"), (result.unexpected_keys, "holds, and the base model has no place for,")):
        if names:
            raise EngineError(f"{folder.full(ADAPTER_WEIGHTS)}: {verb} {shortened(sorted(names))}")
    for name, parameter in model.named_parameters():
        if ".lora_" in name:  # the base model has its types, and its buffers theirs
            parameter.data = parameter.data.to(wanted.torch_dtype)
    _check_taken(folder, model, {name: own[name] for name in whole})
    check_finite(folder.path, model, wanted)
    for name, parameter in model.named_parameters():
        # What a saved module stands in for is not used, and may be random.
        parameter.requires_grad_((train == "all" or parameter.requires_grad) and ".original_module." not in name)
    return eval_mode(model)


def _check_taken(folder: ModelFolder, model: nn.Module, own: dict[str, Tensor]) -> None:
    """Refuse an adapter whose whole tensors are not in the model now: what they stand in for may be random."""
    state = {name.replace(".modules_to_save.default.", "."): value for name, value in model.state_dict().items()}
    wrong = [n for n, value in own.items() if n not in state or not torch.equal(value.to(state[n]), state[n])]
    if wrong:
        raise EngineError(
            f"{folder.full(ADAPTER_WEIGHTS)}: holds {shortened(sorted(wrong))}, which peft did not put into the model; "
            f"expected them in modules_to_save of {ADAPTER_CONFIG}"
        )


def _own_name(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _lora_values(path: str, stored: dict[str, Stored]) -> dict[str, Any]:
    """The adapter's config, with the modules that its weights name in place of a pattern."""
    values = read_mapping(path)
    if values.get("peft_type") != "LORA":
        raise EngineError(
            f"{path}: peft_type is {shortened([str(values.get('peft_type'))])}; only LORA can be scored with"
        )
    refuse_packed(path, stored)
    modules = {match["module"] for name in stored if ".lora_" in name and (match := _KEY.match(name))}
    if not modules:
        raise EngineError(f"{os.path.dirname(path)}: the weights hold no lora_A and lora_B of any layer")
    _check_keys(path, values)
    _check_sizes(path, values, stored)
    return {key: value for key, value in values.items() if key in _TOLD} | {"target_modules": sorted(modules)}


def _check_keys(path: str, values: Mapping[str, Any]) -> None:
    """Refuse what is more than LoRA, and names that would be matched for ever as the patterns that they may be."""
    if more := sorted(key for key, value in values.items() if value and key not in _TOLD | _IDLE):
        raise EngineError(
            f"{path}: sets {shortened(more)}; only LoRA, rsLoRA and DoRA can be scored with (peft's merge_and_unload "
            "makes a whole model of some others)"
        )
    if (init := values.get("init_lora_weights")) not in _INITS:
        raise EngineError(
            f"{path}: init_lora_weights is {shortened([str(init)])}, which changes the base model's weights; save the "
            "adapter with path_initial_model_for_weight_conversion"
        )
    saved = values.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(m, str) and re.fullmatch(r"[\w.]{1,1000}", m) for m in saved):
        raise EngineError(f"{path}: modules_to_save must be a list of layers' names")
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = values.get(key) or {}
        if not isinstance(patterns, dict) or any(map(_is_slow, patterns)):
            raise EngineError(f"{path}: {key} must map names of layers, without repetition, to numbers")


def _is_slow(pattern: str) -> bool:
    """Whether matching a regular expression could take long: it repeats something, or has many ways to go."""
    if len(pattern) > 1000 or re.search(r"[*+{]", pattern):
        return True
    ways = math.prod(1 + group.count("|") for group in pattern.split("("))
    return (ways << pattern.count("?")) > _MAX_WAYS


def _check_sizes(path: str, values: Mapping[str, Any], stored: Mapping[str, Stored]) -> None:
    """Refuse ranks and numbers of patterns beyond what the weights can have, before anything is made of that size."""
    largest = max(max(tensor.shape, default=0) for name, tensor in stored.items() if ".lora_" in name)
    ranks = [values.get("r"), *(values.get("rank_pattern") or {}).values()]
    if beyond := [rank for rank in ranks if isinstance(rank, int) and rank > largest]:
        raise EngineError(
            f"{path}: wants a rank of {shortened([str(beyond[0])])}; no tensor of its weights is larger than {largest}"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if len(values.get(key) or {}) > max(1000, len(stored)):
            raise EngineError(f"{path}: {key} names more layers than the weights hold")
