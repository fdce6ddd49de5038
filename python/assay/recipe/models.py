"""The models of a recipe: how each kind is built, and what identifies it.

None of it can run a stranger's code: weights come as safetensors or GGUF, never as pickles; nothing is
downloaded; a checkpoint's own Python never runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import PrivateAttr, model_validator
from torch import nn

from assay._lazy import require
from assay.corpus.storage import sha256
from assay.recipe import model_labels
from assay.recipe.adapters import Train, find_adapter, load_adapter, refuse_adapter
from assay.recipe.checkpoints import Dtype, Wanted, load_folder, load_gguf
from assay.recipe.errors import EngineError
from assay.recipe.library_calls import refusing
from assay.recipe.model_files import (
    ModelFolder,
    check_file,
    find_model_folder,
    read_safetensors,
    refuse_packed,
    shortened,
)
from assay.recipe.parts import ExistingPath, Part, Registry, located
from assay.recipe.tokenizer import behaviour, differences, load_gguf_tokenizer, load_tokenizer

# What can change a score: weights, shapes, tokens. A README or a training log cannot.
_MODEL_FILES = (".safetensors", ".gguf", ".json", ".txt", ".model")


class ModelSpec(Part):
    """One model of a recipe. Subclass it, and register the subclass, to bring models of your own."""

    kind: str
    path: ExistingPath
    _name: str = PrivateAttr(default="")
    """What the recipe calls it."""

    @property
    def trust(self) -> tuple[str, ...]:
        """The modules whose Python it may run, as the caller allowed."""
        return ()

    def build(self) -> nn.Module:
        """Load the model."""
        raise NotImplementedError

    def build_for(self, auto_class: str) -> nn.Module:
        """Load the model for a task, of which ``auto_class`` is what transformers calls its models' class."""
        return self.build()

    def tokenizer(self) -> Any | None:
        """The model's own tokenizer, for models of text."""
        return None

    def input_size(self, model: nn.Module) -> int | None:
        """How many numbers one input has, if the model tells."""
        return None

    def output_size(self, model: nn.Module) -> int | None:
        """How many logits one input gives, if the model tells."""
        return None

    def label_names(self, model: nn.Module) -> tuple[str, ...] | None:
        """The names of the classes in the order of its logits, if the model tells."""
        return None

    def identity(self) -> dict[str, Any]:
        """The parameters that change scores; where the files lie is not among them."""
        return self.model_dump(exclude={"path"})

    def verify(self, model: nn.Module, fingerprint: str) -> None:
        """EngineError if a built model is not the one of this fingerprint, where its files alone do not decide it."""

    def fingerprint(self) -> str:
        """SHA-256 of the contents of the model's files."""
        if os.path.isfile(self.path):
            return f"sha256:{file_sha256(self.path)}"
        names = (name for name in os.listdir(self.path) if name.endswith(_MODEL_FILES))
        return files_sha256((n, f) for n in sorted(names) if os.path.isfile(f := os.path.join(self.path, n)))


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
        stored = read_safetensors(self.path)
        indices = sorted(int(m[1]) for m in map(re.compile(r"([0-9]{1,6})\.weight").fullmatch, stored) if m)
        expected = {f"{i}.{kind}" for i in range(0, 2 * len(indices), 2) for kind in ("weight", "bias")}
        if not indices or stored.keys() - expected or indices != list(range(0, 2 * len(indices), 2)):
            raise EngineError(
                f"{self.path}: holds {shortened(sorted(stored), 6)}; expected 0.weight, 0.bias, 2.weight, "
                "…: linear layers with a ReLU between each two"
            )
        layers: list[nn.Module] = []
        inputs: int | None = None
        for i in indices:
            weight, bias = stored[f"{i}.weight"], stored.get(f"{i}.bias")
            if len(weight.shape) != 2 or not weight.numbers or inputs not in (None, weight.shape[1]):
                raise EngineError(f"{self.path}: {i}.weight of shape {weight.shape} does not fit the one before")
            outputs, inputs = weight.shape
            if bias is not None and bias.shape != (outputs,):
                raise EngineError(f"{self.path}: {i}.bias of shape {bias.shape} does not fit {i}.weight")
            layers += [nn.Linear(inputs, outputs, bias=bias is not None, device="meta"), nn.ReLU()]
            inputs = outputs
        refuse_packed(self.path, stored)
        model = nn.Sequential(*layers[:-1])
        with refusing(f"{self.path}: safetensors cannot read it"):
            # Copies: what is loaded may be the file itself, which somebody writes over.
            weights = require("safetensors.torch", "cli").load_file(self.path)
            model.load_state_dict({name: weight.clone().float() for name, weight in weights.items()}, assign=True)
        return model.eval()

    def input_size(self, model: nn.Module) -> int | None:
        return int(next(model.parameters()).shape[1])

    def output_size(self, model: nn.Module) -> int | None:
        *_, weight = (p for p in model.parameters() if p.ndim == 2)
        return int(weight.shape[0])


@MODELS.add("transformers")
class TransformersSpec(ModelSpec):
    """A model of Hugging Face transformers, of the class that the task wants: a folder with safetensors, or one
    ``.gguf`` file. ``adapter`` is the folder of a LoRA adapter of peft; then ``train`` says which parameters are the
    ones that gradients are taken of. ``dtype`` is the type of its numbers; scores are float32 all the same."""

    kind: Literal["transformers"]
    dtype: Dtype = "float32"
    adapter: ExistingPath | None = None
    train: Train | None = None

    @model_validator(mode="after")
    def _train_goes_with_an_adapter(self) -> TransformersSpec:
        if self.adapter is None and self.train is not None:
            raise located(("train",), "goes with an adapter; without one all parameters are trained ones", self.train)
        if self.adapter is not None and self._is_gguf:
            raise located(("adapter",), "goes with a model's folder, not with a .gguf file", self.adapter)
        return self

    def build(self) -> nn.Module:
        return self.build_for("AutoModelForCausalLM")

    def build_for(self, auto_class: str) -> nn.Module:
        wanted = Wanted(auto_class, self.dtype)
        if self._is_gguf:
            return load_gguf(self.path, wanted)
        folder, adapter = self._folders()
        if adapter is None:
            return load_folder(folder, wanted)
        return load_adapter(adapter, folder, wanted, self.train or "adapter")

    def output_size(self, model: nn.Module) -> int | None:
        return model_labels.output_size(model)

    def label_names(self, model: nn.Module) -> tuple[str, ...] | None:
        return model_labels.label_names(model)

    def tokenizer(self) -> Any:
        if self._is_gguf:
            return load_gguf_tokenizer(self.path)
        folder, adapter = self._folders()
        return load_tokenizer(adapter if adapter and adapter.has_vocabulary else folder, folder)

    def identity(self) -> dict[str, Any]:
        trained = {"train": self.train or "adapter"} if self.adapter is not None else {}
        return {"kind": self.kind, "dtype": self.dtype, **trained}

    def fingerprint(self) -> str:
        """SHA-256 of all that decides outputs: config, weights, tokenizer, processor; of its adapter too; and the
        type of the numbers."""
        if self._is_gguf:
            check_file(self.path)
            return files_sha256([("model.gguf", self.path)], self.dtype)
        folder, adapter = self._folders()
        files = [(name, folder.full(name)) for name in folder.fingerprint_files()]
        if adapter is not None:
            files += [(f"adapter/{name}", adapter.full(name)) for name in adapter.fingerprint_files()]
        return files_sha256(files, self.dtype)

    @property
    def _is_gguf(self) -> bool:
        return self.path.endswith(".gguf") and os.path.isfile(self.path)

    def _folders(self) -> tuple[ModelFolder, ModelFolder | None]:
        """The model's folder, and its adapter's."""
        folder = find_model_folder(self.path)
        refuse_adapter(folder)
        return folder, None if self.adapter is None else find_adapter(self.adapter)


def build_models(
    specs: Mapping[str, ModelSpec], auto_class: str, known: Mapping[str, str] | None = None
) -> dict[str, nn.Module]:
    """Load a recipe's models for its task; errors begin with the key of theirs. They have to be those of the ``known``
    fingerprints."""
    models = {}
    for name, spec in specs.items():
        with naming(f"models.{name}"):
            models[name] = spec.build_for(auto_class)
            if known and name in known:
                spec.verify(models[name], known[name])
    return models


def fingerprints(specs: Mapping[str, ModelSpec]) -> dict[str, str]:
    """What identifies a recipe's models; errors begin with the key of theirs."""
    result = {}
    for name, spec in specs.items():
        with naming(f"models.{name}"):
            result[name] = spec.fingerprint()
    return result


def own_tokenizers(specs: Mapping[str, ModelSpec]) -> dict[str, Any]:
    """By model the tokenizers of a text recipe, one at least; EngineError unless they do the same: a text would mean
    different tokens."""
    found: dict[str, Any] = {}
    for name, spec in specs.items():
        with naming(f"models.{name}"):
            tokenizer = spec.tokenizer()
        if tokenizer is not None:
            found[name] = tokenizer
    if not found:
        raise EngineError("none of the recipe's models has a tokenizer; a task of texts needs one")
    refuse_differences({name: behaviour(tokenizer) for name, tokenizer in found.items()})
    return found


def refuse_differences(behaviours: Mapping[str, Mapping[str, Any]]) -> None:
    """EngineError if the tokenizers of two models behave differently."""
    (first, ours), *others = behaviours.items()
    for name, theirs in others:
        if parts := differences(ours, theirs):
            raise EngineError(
                f"models.{first} and models.{name} have tokenizers with different {'; '.join(parts)}; score them in "
                "recipes of their own"
            )


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """Errors begin with the recipe's key."""
    try:
        yield
    except EngineError as error:
        raise type(error)(f"{key}: {error}") from error


def files_sha256(files: Iterable[tuple[str, str]], *more: str) -> str:
    """SHA-256 of files' names and contents, given as (name, path), and of what ``more`` decides outputs."""
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(os.fsencode(f"{name}\0{file_sha256(path)}\n"))
    for text in more:
        digest.update(os.fsencode(f"{text}\n"))
    return f"sha256:{digest.hexdigest()}"


class Hashed(NamedTuple):
    """A file's SHA-256, and by what it is known to be the same file still: no write leaves all of that as it was."""

    stamp: tuple[int, ...]
    sha256: str


_HASHED: dict[str, Hashed] = {}
# A clock's ticks: a file that has only just been written may be written again within one.
_SETTLED_NS = 2 * 10**9


def file_sha256(path: str) -> str:
    """The SHA-256 of a file's content. Large weights are read once per run, unless they change."""
    status = os.stat(path)
    stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    known = _HASHED.get(path)
    if known is not None and known.stamp == stamp:
        return known.sha256
    settled = time.time_ns() - status.st_ctime_ns > _SETTLED_NS
    with open(path, "rb") as file:
        found = Hashed(stamp, sha256(file))
    if settled:
        _HASHED[path] = found
    return found.sha256


def hashed_files() -> dict[str, Hashed]:
    """What this process has read of files by path, for another one on the same machine: `take_hashed`."""
    return dict(_HASHED)


def take_hashed(files: Mapping[str, Hashed]) -> None:
    """What another process has read of files need not be read again, as long as they are the same."""
    _HASHED.update(files)
