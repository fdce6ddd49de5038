"""Models that a Python function makes: ``{kind: python, factory: mypackage.models:make, path: weights.safetensors}``.

A recipe alone can't have it run: the caller must trust the module by name (``--trust mypackage``), which means this
module and those below it. Before that is known, nothing is imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import random
import re
import weakref
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, JsonValue, PrivateAttr, ValidationInfo, model_validator
from torch import Tensor, nn

from assay._lazy import require
from assay.recipe.errors import EngineError
from assay.recipe.library_calls import refusing
from assay.recipe.model_files import find_tokenizer, read_safetensors, shortened, sizes
from assay.recipe.models import MODELS, ModelSpec, files_sha256
from assay.recipe.parts import ExistingPath, located
from assay.recipe.tokenizer import load_tokenizer

_MODULE = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
_FACTORY = re.compile(rf"({_MODULE}):([A-Za-z_]\w*)", re.ASCII)


def is_trusted(module: str, trust: Iterable[str]) -> bool:
    """Whether a module is one of the trusted ones, or below one of them."""
    return any(module == name or module.startswith(f"{name}.") for name in trust)


def check_trust(trust: Iterable[str]) -> tuple[str, ...]:
    """Names of modules, as `--trust` gives them. EngineError for what is none."""
    names = tuple(trust)
    if wrong := [name for name in names if not re.fullmatch(_MODULE, name, re.ASCII)]:
        raise EngineError(f"--trust {shortened(wrong, 1)}: expected the name of a module, such as mypackage")
    return names


def _trust_of(info: ValidationInfo) -> tuple[str, ...]:
    return tuple((info.context or {}).get("trust", ()))


@MODELS.add("python")
class PythonSpec(ModelSpec):
    """What a function of an importable module returns: an `nn.Module`, called with ``arguments``. With a ``path``, all
    of its weights come from that safetensors file. A model of texts has a ``tokenizer_path``: the folder of its
    tokenizer, or of a model of transformers that has it."""

    kind: Literal["python"]
    factory: str
    path: ExistingPath | None = None  # type: ignore[assignment]  # its weights may be its own
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    tokenizer_path: ExistingPath | None = None
    _trust: tuple[str, ...] = PrivateAttr(default=())
    _tried: tuple[Callable[[], nn.Module | None], tuple[int, int] | None] | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _is_trusted(cls, data: Any, info: ValidationInfo) -> Any:
        factory = data.get("factory") if isinstance(data, Mapping) else None
        match = _FACTORY.fullmatch(factory) if isinstance(factory, str) else None
        if match is None:
            raise located(("factory",), "expected module:function, such as mypackage.models:make", factory)
        if not is_trusted(match[1], _trust_of(info)):
            # Before anything else of it is looked at: its arguments may be of any size.
            raise located(
                ("factory",),
                f"runs Python of the module {match[1]}, which only the command line can allow: --trust {match[1]}",
                factory,
            )
        return data

    @model_validator(mode="after")
    def _keep_trust(self, info: ValidationInfo) -> PythonSpec:
        self._trust = _trust_of(info)
        return self

    @property
    def trust(self) -> tuple[str, ...]:
        return self._trust

    def build(self) -> nn.Module:
        """Call the factory, with random numbers that the model's name decides, and give the model its weights.

        Raises:
            EngineError: the module or the function is not there or not trusted, it raises, it returns no `nn.Module`,
                or the file's tensors are not exactly those of the model.
        """
        make = self._function()
        with refusing(f"{self.factory}: cannot make the model"), _same_random_numbers(self._name):
            model = make(**self.arguments)
        if not isinstance(model, nn.Module):
            raise EngineError(f"{self.factory}: returned a {type(model).__name__}; expected a torch.nn.Module")
        if self.path is not None:
            load_weights(self.path, model, self.factory)
        return model.eval()

    def tokenizer(self) -> Any | None:
        return None if self.tokenizer_path is None else load_tokenizer(find_tokenizer(self.tokenizer_path), None)

    def input_size(self, model: nn.Module) -> int | None:
        found = self._sizes(model)
        return found[0] if found else None

    def output_size(self, model: nn.Module) -> int | None:
        found = self._sizes(model)
        return found[1] if found else None

    def _sizes(self, model: nn.Module) -> tuple[int, int] | None:
        """A model is tried out once, and not kept for that."""
        if self._tried is None or self._tried[0]() is not model:
            self._tried = weakref.ref(model), tried_out(model)
        return self._tried[1]

    def identity(self) -> dict[str, Any]:
        return self.model_dump(exclude={"path", "tokenizer_path"})

    def fingerprint(self) -> str:
        """SHA-256 of the weights, the tokenizer, and the source files of the module and of the function. Without a file
        of weights the factory is called for those that it makes."""
        return self._fingerprint(None if self.path is not None else self.build())

    def verify(self, model: nn.Module, fingerprint: str) -> None:
        if self.path is None and self._fingerprint(model) != fingerprint:
            raise EngineError(
                f"{self.factory}: made another model than the one that this run began with; save its weights as "
                "safetensors and name them as path, or seed all that it draws from"
            )

    def _fingerprint(self, model: nn.Module | None) -> str:
        files = [] if self.path is None else [("weights", self.path)]
        if self.tokenizer_path is not None:
            folder = find_tokenizer(self.tokenizer_path)
            files += [(f"tokenizer/{name}", folder.full(name)) for name in folder.tokenizer]
        for name in dict.fromkeys((self._module().__name__, self._function().__module__)):
            source = getattr(importlib.import_module(name), "__file__", None)
            if not isinstance(source, str):
                raise EngineError(f"{self.factory}: the module {name} has no source file, by which to know its version")
            files.append((name, source))
        return files_sha256(files, self.factory, *([] if model is None else [self._weights_sha256(model)]))

    def _weights_sha256(self, model: nn.Module) -> str:
        digest = hashlib.sha256()
        with refusing(f"{self.factory}: its model's weights cannot be read"):
            for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode(errors="backslashreplace"))
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _module(self) -> ModuleType:
        name = self.factory.partition(":")[0]
        if not is_trusted(name, self._trust):
            raise EngineError(f"{self.factory}: its module is not trusted")
        with refusing(f"{self.factory}: its module cannot be imported"):
            return importlib.import_module(name)

    def _function(self) -> Any:
        name = self.factory.partition(":")[2]
        found = getattr(self._module(), name, None)
        if not callable(found):
            raise EngineError(f"{self.factory}: its module has no function {name!r}")
        home = getattr(found, "__module__", None)
        if not isinstance(home, str) or not is_trusted(home, self._trust):
            raise EngineError(
                f"{self.factory}: is a function of {home or 'no module'}, which is not trusted; only those of "
                f"{', '.join(self._trust)} are"
            )
        return found


@contextlib.contextmanager
def _same_random_numbers(name: str) -> Iterator[None]:
    """Whoever draws begins at a number that the name decides; afterwards it is as if nobody had drawn."""
    seed = zlib.crc32(name.encode(errors="backslashreplace"))
    python, numpy = random.getstate(), np.random.get_state()
    # Not to wake up devices that nothing uses.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def tried_out(model: nn.Module) -> tuple[int, int] | None:
    """How many numbers a model takes and gives, if it takes vectors, of the one size that some linear layer of it has,
    and gives a vector each. None if that is not so: then the recipe's task has to say."""
    sizes = dict.fromkeys(layer.in_features for layer in model.modules() if isinstance(layer, nn.Linear))
    first = next(model.parameters(), torch.empty(0))
    found = []
    for size in sizes:
        try:
            with torch.no_grad():
                output = model(first.new_zeros(2, size))
        except Exception:  # whatever a model raises: it does not take these
            continue
        if isinstance(output, Tensor) and output.ndim == 2 and len(output) == 2:
            found.append((size, output.shape[1]))
    return found[0] if len(found) == 1 else None


def load_weights(path: str, model: nn.Module, factory: str) -> None:
    """Give a model the tensors of a safetensors file: all of its own, and no others. Of tied ones, one is enough."""
    stored, own = read_safetensors(path), model.state_dict(keep_vars=True)
    present = {id(tensor) for name, tensor in own.items() if name in stored}
    missing = [name for name, tensor in own.items() if name not in stored and id(tensor) not in present]
    other = [
        f"{name} {sizes(stored[name].shape)} for {sizes(tensor.shape)}"
        for name, tensor in own.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    packed = [name for name, t in own.items() if name in stored and t.is_floating_point() and not stored[name].floating]
    faults = {
        "lacks": missing,
        "holds, and the model does not,": sorted(stored.keys() - own.keys()),
        "holds, of another shape than the model's,": other,
        "holds no floating-point numbers of 16 bits or more in": packed,
    }
    said = "; ".join(f"{verb} {shortened(names)}" for verb, names in faults.items() if names)
    if said:
        raise EngineError(f"{path}: does not fit what {factory} returns: {said}")
    with refusing(f"{path}: safetensors cannot read it"):
        tensors = require("safetensors.torch", "cli").load_file(path)
    model.load_state_dict(tensors, strict=False)  # what it would find is in the faults above
    wrong = [name for name in _shared(own) if name in tensors and not _same(tensors[name].to(own[name]), own[name])]
    if wrong:
        raise EngineError(
            f"{path}: holds other values for {shortened(wrong)} than for what is the same tensor in {factory}'s model"
        )


def _shared(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that share memory with others of them."""
    names = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.device.type != "meta":
            names[tensor.device, tensor.untyped_storage().data_ptr()].append(name)
    return [name for group in names.values() if len(group) > 1 for name in group]


def _same(one: Tensor, other: Tensor) -> bool:
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
