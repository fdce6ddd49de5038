"""The files of a model on disk: which there are, and what their headers say, before any library opens one.

Nothing here reads a weight. What a folder's own files say about names, sizes and counts is checked against the
weights' headers, because it comes from strangers.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from assay.corpus.safetensors_header import HeaderError, read_header
from assay.recipe.errors import EngineError

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
WEIGHTS, ADAPTER_WEIGHTS, INDEX = "model.safetensors", "adapter_model.safetensors", "model.safetensors.index.json"

# Where transformers keeps a tokenizer's chat templates beside the first, the one for tools among them.
_TEMPLATES = "additional_chat_templates"
# Whatever decides which tokens a text becomes, or how a sample is prepared. A README or a training log does not.
_TOKENIZER_FILE = re.compile(
    r"tokenizer.*\.json|tekken\.json|special_tokens_map\.json|added_tokens\.json|vocab.*\.(json|txt|bpe)|merges\.txt"
    r"|bpe\.codes|dict\.txt|.*\.(model|spm|tiktoken)|chat_template.*\.(json|jinja)"
    rf"|{_TEMPLATES}/.*\.jinja|(.*_)?(pre)?processor_config\.json"
)
# Those of them without which transformers makes a tokenizer of special tokens alone.
_VOCABULARY = re.compile(r"(tokenizer|tekken)\.json|vocab.*|dict\.txt|.*\.(model|spm|tiktoken)")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_LFS = b"version https://git-lfs.github.com/spec"
_MAX_JSON, _MAX_DEPTH = 512 << 20, 20
_MAX_COUNT = 1_000_000
_COUNT = re.compile(r"(^|_)(n|num)_|layer|block|depth|head|expert|label")
_NO_COUNT = re.compile(r"param|token|position|ctx|context|embd|size|dim|length|_ids?$")
_FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Stored:
    """One tensor of a weights file: its shape, and whether it holds floating-point numbers as they are."""

    shape: tuple[int, ...]
    floating: bool = True

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelFolder:
    """The files of a folder that make a model, by name; nothing else in it is opened."""

    path: str
    config: str
    weights: tuple[str, ...]
    tokenizer: tuple[str, ...]

    def full(self, name: str) -> str:
        return os.path.join(self.path, name)

    @property
    def has_vocabulary(self) -> bool:
        return any(_VOCABULARY.fullmatch(name) for name in self.tokenizer)

    def fingerprint_files(self) -> list[str]:
        return sorted((self.config, *self.weights, *self.tokenizer))


def find_model_folder(path: str) -> ModelFolder:
    """What a folder of a language model, or of an adapter of one, holds.

    Raises:
        EngineError: a file is missing, or is not what its name says.
    """
    if not os.path.isdir(path):
        raise EngineError(f"{path}: expected a folder with safetensors, or a .gguf file")
    names = _names(path)
    adapter = ADAPTER_CONFIG in names
    config, single = (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if adapter else (CONFIG, WEIGHTS)
    if config not in names:
        raise EngineError(f"{path}: no {CONFIG} (of a model) or {ADAPTER_CONFIG} (of a LoRA adapter) in it")
    if single in names:
        weights: Sequence[str] = [single]
    elif INDEX in names and not adapter:
        weights = sorted(set(_weight_map(os.path.join(path, INDEX)).values()))
    else:
        pickled = [name for name in names if name.endswith(_PICKLES)]
        hint = (
            f"; {shortened(pickled)} may be a pickle, which is never opened: save it as safetensors" if pickled else ""
        )
        raise EngineError(f"{path}: transformers cannot load it (no {single} in it{hint})")
    tokenizer = [name for name in names if _TOKENIZER_FILE.fullmatch(name)]
    folder = ModelFolder(path, config, tuple(weights), tuple(tokenizer))
    for name in folder.fingerprint_files():
        check_file(folder.full(name))
    return folder


def find_tokenizer(path: str) -> ModelFolder:
    """The tokenizer in a folder, a model's or one of its own. EngineError if there is none, as `find_model_folder`."""
    names = _names(path) if os.path.isdir(path) else []
    folder = ModelFolder(path, "", (), tuple(name for name in names if _TOKENIZER_FILE.fullmatch(name)))
    for name in folder.tokenizer:
        check_file(folder.full(name))
    return folder


def _names(path: str) -> list[str]:
    """What lies in a model's folder, and its further chat templates."""
    names, below = sorted(os.listdir(path)), os.path.join(path, _TEMPLATES)
    return names + [f"{_TEMPLATES}/{name}" for name in (sorted(os.listdir(below)) if os.path.isdir(below) else [])]


def check_file(path: str) -> int:
    """The size of a regular file that is neither empty nor a stand-in for one kept by Git LFS."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: cannot be read ({one_line(error)})") from error
    if not stat.S_ISREG(status.st_mode):
        raise EngineError(f"{path}: is no regular file")
    try:
        with open(path, "rb") as file:
            start = file.read(len(_LFS))
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({one_line(error)})") from error
    if start == _LFS:
        raise EngineError(f"{path}: is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    if not start:
        raise EngineError(f"{path}: is empty")
    return status.st_size


def read_mapping(path: str) -> dict[str, Any]:
    """A JSON file that must hold a mapping."""
    if check_file(path) > _MAX_JSON:
        raise EngineError(f"{path}: is larger than {_MAX_JSON >> 20} MiB")
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise EngineError(f"{path}: not valid JSON ({one_line(error)})") from error
    if not isinstance(data, dict):
        raise EngineError(f"{path}: holds {_kind(data)}; expected a mapping")
    if _depth(data) > _MAX_DEPTH:
        raise EngineError(f"{path}: is nested more than {_MAX_DEPTH} deep")
    return data


def _depth(data: Any, depth: int = 0) -> int:
    """How deep lists and mappings are nested, as far as it matters."""
    inner = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    if depth > _MAX_DEPTH:
        return depth
    return max((_depth(v, depth + 1) for v in inner if isinstance(v, dict | list)), default=depth)


def read_weights(folder: ModelFolder) -> dict[str, Stored]:
    """The tensors of a folder's weights, from their headers. An EngineError for one that is there twice, or is not
    where the index says."""
    if folder.weights[0] in (WEIGHTS, ADAPTER_WEIGHTS):
        return read_safetensors(folder.full(folder.weights[0]))
    files = _weight_map(folder.full(INDEX))
    tensors: dict[str, Stored] = {}
    for name in folder.weights:
        own = read_safetensors(folder.full(name))
        if twice := sorted(own.keys() & tensors.keys()):
            raise EngineError(f"{folder.full(name)}: {shortened(twice)} stand in another of the model's files too")
        listed = {tensor for tensor, file in files.items() if file == name}
        if absent := sorted(listed - own.keys()):
            raise EngineError(f"{folder.full(name)}: lacks {shortened(absent)}, which {INDEX} says it holds")
        if more := sorted(own.keys() - listed):
            raise EngineError(f"{folder.full(name)}: holds {shortened(more)}, which {INDEX} does not list")
        tensors |= own
    return tensors


def _weight_map(path: str) -> dict[str, str]:
    """Tensor -> file of an index; each file lies beside it."""
    found = read_mapping(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise EngineError(f"{path}: has no weight_map; expected tensors' names with their files")
    for tensor, name in found.items():
        if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(".safetensors"):
            raise EngineError(
                f"{path}: {shortened([tensor])} is said to be in {shortened([str(name)])}; expected a .safetensors "
                "file of the same folder"
            )
    return found


def read_safetensors(path: str) -> dict[str, Stored]:
    """The tensors of a safetensors file, from its header.

    Raises:
        EngineError: it is none, is cut short, or names a tensor twice.
    """
    size = check_file(path)
    try:
        with open(path, "rb") as file:
            tensors = read_header(file, size).tensors
    except HeaderError as error:
        raise EngineError(f"{path}: {error}") from error
    return {name: Stored(facts.shape, facts.dtype in _FLOATS) for name, facts in tensors.items()}


def check_counts(path: str, values: Mapping[str, Any], tensors: int) -> None:
    """Refuse a config that wants more layers than there are tensors, before anything counts up to them."""
    for key, value in _integers(values):
        name = key.rpartition(".")[2].lower()
        if not _COUNT.search(name) or _NO_COUNT.search(name):
            continue
        limit = max(tensors, 1000) if re.search(r"layers?$|block_count$|depth$", name) else _MAX_COUNT
        if value > limit:
            shown = f"{value:,}" if value < 10**15 else f"about 10^{len(str(value)) - 1}"
            raise EngineError(f"{path}: {shortened([key])} is {shown}, but the weights hold only {tensors:,} tensors")


def _integers(values: Any, key: str = "") -> Iterable[tuple[str, int]]:
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _integers(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from _integers(value, key)
    elif isinstance(values, int | float) and math.isfinite(values):
        yield key, int(values)


def shortened(names: Iterable[str], shown: int = 3) -> str:
    """A few names, each of bounded length, and how many more there are."""
    names = list(names)
    few = ", ".join(name if len(name) <= 80 else f"{name[:60]}…{name[-15:]}" for name in names[:shown])
    return few + (f" and {len(names) - shown:,} more" if len(names) > shown else "")


def one_line(error: BaseException) -> str:
    """An error of a library on one short line."""
    text = " ".join(str(error)[:2000].split())
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}"


def _kind(data: Any) -> str:
    return "null" if data is None else f"a {type(data).__name__}"


def sizes(shape: Iterable[int]) -> str:
    """A tensor's shape in words."""
    return "×".join(map(str, shape)) or "scalar"


def refuse_packed(path: str, stored: Mapping[str, Stored]) -> None:
    """EngineError if one of a file's tensors holds something else than floating-point numbers."""
    if packed := sorted(name for name, tensor in stored.items() if not tensor.floating):
        raise EngineError(f"{path}: {shortened(packed)} hold no floating-point numbers of 16 bits or more")
