"""Models of transformers from safetensors and GGUF files, whole or not at all.

transformers gets tensors and a private folder with copies of the small files that were looked at, never the
model's own folder: what lies there besides, or where a config points to, cannot be opened.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

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
    sizes,
)
from assay.recipe.model_labels import LABEL_KEYS, check_architecture, check_padding_token, has_labels, read_labels

# Keys of a config that name code or files, or choose kernels from elsewhere; those of labels go through `read_labels`.
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
    *LABEL_KEYS,
}
_TIMM = {"timm_wrapper", "timm_backbone", "gemma3n_vision"}

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Wanted:
    """What a recipe wants of a model: the class of transformers that its task names, and the type of its numbers."""

    auto_class: str = "AutoModelForCausalLM"
    dtype: Dtype = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


def load_folder(folder: ModelFolder, wanted: Wanted, elsewhere: Mapping[str, Stored] | None = None) -> nn.Module:
    """The model of a folder, whose weights may lack those that come from ``elsewhere``.

    Raises:
        EngineError: a file cannot be read or lies about another; a tensor is missing, left over, or of another
            shape than the config says; the architecture has no model for the task.
    """
    config_file, stored = folder.full(CONFIG), read_weights(folder)
    values = read_config(folder, len(stored), wanted.auto_class)
    budget = Budget(config_file, len(stored), sum(tensor.numbers for tensor in stored.values()))
    transformers = require("transformers", "text")
    options: dict[str, Any] = {"dtype": wanted.torch_dtype}
    with quietly():
        with refusing(f"{config_file}: transformers cannot load it"), staged({CONFIG: values}) as private:
            config = transformers.AutoConfig.from_pretrained(private, local_files_only=True, trust_remote_code=False)
            _refuse_timm(config_file, config)
            auto_class = _auto_class(config_file, config, wanted.auto_class)
            with torch.device("meta"), budget.enforced():
                skeleton = auto_class.from_config(copy.deepcopy(config), **options, trust_remote_code=False)
                if labels := _labels_of(skeleton, elsewhere or {}, values):
                    config.num_labels = labels
                    skeleton = auto_class.from_config(copy.deepcopy(config), **options, trust_remote_code=False)
                if _lacks_pooler(skeleton, stored):
                    options["add_pooling_layer"] = False
                    skeleton = type(skeleton)._from_config(copy.deepcopy(config), **options)
        _check_dtypes(folder, skeleton, stored)
        with refusing(f"{folder.path}: transformers cannot load its weights"):
            model, report = type(skeleton).from_pretrained(
                None,
                config=config,
                state_dict=_slices(folder),
                ignore_mismatched_sizes=True,  # they are in the report
                output_loading_info=True,
                local_files_only=True,
                **options,
            )
    _check_report(folder.path, model, report, elsewhere or {})
    _check_duplicates(folder.path, model, stored)
    with refusing(f"{config_file}: transformers cannot tell which weights are tied"):
        _check_ties(config_file, model)
    return _finished(folder.path, config_file, model, wanted)


def load_gguf(path: str, wanted: Wanted) -> nn.Module:
    """The model of a GGUF file. Raises as `load_folder` does."""
    header = read_gguf(path)
    check_counts(path, header.values, len(header.tensors))
    budget = Budget(path, len(header.tensors), sum(tensor.numbers for tensor in header.tensors.values()))
    transformers = require("transformers", "text")
    require("gguf", "text")
    refusals = refusing(f"{path}: transformers cannot load it")
    with staged({}, {"model.gguf": path}) as private, quietly(), refusals, budget.enforced():
        model, report = getattr(transformers, wanted.auto_class).from_pretrained(
            private,
            gguf_file="model.gguf",
            dtype=wanted.torch_dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    _check_report(path, model, report, {})
    return _finished(path, path, model, wanted)


def _finished(path: str, config_file: str, model: nn.Module, wanted: Wanted) -> nn.Module:
    """The model of a folder or file, once it is known to be whole."""
    with refusing(f"{config_file}: transformers cannot tell what texts are padded with"):
        check_padding_token(config_file, model)
    check_finite(path, model, wanted)
    if wanted.dtype != "float32":
        model.register_forward_pre_hook(functools.partial(_cast_inputs, wanted.torch_dtype), with_kwargs=True)
    return eval_mode(model)


def check_finite(path: str, model: nn.Module, wanted: Wanted) -> None:
    """Refuse parameters that float16 has made infinite: it ends at 65504."""
    if wanted.dtype == "float16":
        beyond = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
        if beyond:
            raise EngineError(f"{path}: {shortened(beyond)} hold numbers that float16 has not; take bfloat16")


def _cast_inputs(dtype: torch.dtype, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Images come in float32, and not every model casts them itself."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def eval_mode(model: Any) -> nn.Module:
    module: nn.Module = model.eval()
    return module


def _auto_class(config_file: str, config: Any, name: str) -> Any:
    """The class of transformers that makes models of this config for a task."""
    transformers = require("transformers", "text")
    if name == "AutoModel" and type(config) in transformers.AutoModelForTextEncoding._model_mapping:
        encoder = transformers.AutoModelForTextEncoding._model_mapping[type(config)]
        if encoder.__name__.endswith("EncoderModel"):  # T5's: the half that needs nothing but the text
            return transformers.AutoModelForTextEncoding
    auto_class = getattr(transformers, name, None)
    if auto_class is None or type(config) not in auto_class._model_mapping:
        judges = name == "AutoModelForCausalLM" and getattr(config, "is_encoder_decoder", False)
        hint = "; an encoder with a decoder can be a judge (task.kind: judge, judge: encoder_decoder)" if judges else ""
        raise EngineError(
            f"{config_file}: transformers has no model of the architecture {shortened([config.model_type])} for this "
            f"task ({name}){hint}"
        )
    if name == "AutoModel" and getattr(config, "is_encoder_decoder", False):
        raise EngineError(
            f"{config_file}: {shortened([config.model_type])} is an encoder with a decoder; embeddings need an encoder"
        )
    return auto_class


def _labels_of(skeleton: Any, elsewhere: Mapping[str, Stored], values: Mapping[str, Any]) -> int | None:
    """How many labels a head from ``elsewhere`` has, where the config does not say: its own number does not fit."""
    if not has_labels(type(skeleton).__name__) or LABEL_KEYS & values.keys():
        return None
    other = {
        elsewhere[name].shape[:1]
        for name, p in skeleton.named_parameters()
        if name in elsewhere and p.shape != elsewhere[name].shape
    }
    return other.pop()[0] if len(other) == 1 and () not in other else None


def _lacks_pooler(skeleton: Any, stored: Mapping[str, Stored]) -> bool:
    """Whether the weights have no pooler, as those of most trained heads: a model without one can be made of them."""
    names = [name for name, _ in skeleton.named_parameters() if name.startswith("pooler.")]
    found = any(name.startswith(f"{at}pooler.") for name in stored for at in ("", f"{skeleton.base_model_prefix}."))
    return bool(names) and not found and "add_pooling_layer" in inspect.signature(type(skeleton)).parameters


def read_config(folder: ModelFolder, tensors: int, auto_class: str = "") -> dict[str, Any]:
    """The folder's config.json without the keys that could lead out of it, and without labels where the ``auto_class``
    has none; its weights hold so many ``tensors``."""
    path = folder.full(CONFIG)
    given = read_mapping(path)
    _refuse_timm(path, given)
    values: dict[str, Any] = without(given, _DROPPED)
    if has_labels(auto_class):
        check_architecture(path, given, auto_class)
        values |= read_labels(path, given)
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


def _refuse_timm(path: str, config: Any) -> None:
    """EngineError if a config, as JSON or as transformers' object, has a model of timm in it, at any depth: what timm
    makes of its arguments is to unpickle files, or to read elsewhere. Some architectures have one by default."""
    if isinstance(config, list):
        inner: Iterable[Any] = config
    else:
        facts = config if isinstance(config, dict) else vars(config)
        kind = facts["model_type"] if "model_type" in facts else getattr(config, "model_type", None)
        uses = facts.get("use_timm_backbone") or "pretrained_cfg" in facts
        if uses or (isinstance(kind, str) and kind in _TIMM):
            found = kind if isinstance(kind, str) and kind in _TIMM else "use_timm_backbone"
            raise EngineError(
                f"{path}: has a model of timm in it ({found}), which may run code of the model's files; take one that "
                "is of transformers' own classes throughout"
            )
        inner = facts.values()
    for value in inner:
        if isinstance(value, dict | list) or hasattr(value, "to_diff_dict"):
            _refuse_timm(path, value)


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
            os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
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


def _check_report(path: str, model: Any, report: Mapping[str, Any], elsewhere: Mapping[str, Stored]) -> None:
    """What the library only warns of: random numbers in place of weights, or weights that it did not use."""
    other = [f"{name} {sizes(own)} for {sizes(wants)}" for name, own, wants in sorted(report["mismatched_keys"])]
    missing, unused = sorted(set(report["missing_keys"]) - elsewhere.keys()), sorted(report["unexpected_keys"])
    heads = _beside_base(model, missing)
    # Where the file's head is not asked for, because there is to be none or another one, it is no loss.
    if model.base_model is model or len(missing) < len(report["missing_keys"]):
        unused = sorted(set(unused) - set(_beside_base(model, unused)))
    faults = [
        (missing, "lack", "which its config wants"),
        (unused, "hold", "which its config does not want"),
        (other, "hold", "the shape that its config wants"),
    ]
    said = "; ".join(f"{verb} {shortened(names)}, {why}" for names, verb, why in faults if names)
    if said:
        hint = f" (they are a model without the head of {type(model).__name__}: train it on the task first)"
        raise EngineError(
            f"{path}: the weights do not fit the config: they {said}{hint if heads and heads == missing else ''}"
        )


def _beside_base(model: Any, names: Iterable[str]) -> list[str]:
    """Those of the ``names`` that are no part of the model below its head, with or without its prefix."""
    prefix = f"{model.base_model_prefix}."
    own = {name for name, _ in model.base_model.named_children()}
    if model.base_model is not model:
        return [name for name in names if not name.startswith(prefix) or name.startswith(f"{prefix}pooler.")]
    return [name for name in names if name.removeprefix(prefix).split(".")[0] not in own]


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
