"""Ablations by merging: models of parts of the data, averaged, stand for a model of their union, 2410.15661."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assay._lazy import require
from assay.retrain.checks import Floats, finite, rows_of
from assay.retrain.samples import short

Source = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]
"""A model, its state, a .safetensors file, or a folder with model.safetensors or an index of several such files."""

_WEIGHTS, _INDEX, _CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_NO_MATTER = {"_name_or_path", "transformers_version"}  # keys of a configuration that decide nothing, at any depth
_BESIDE = (".json", ".txt", ".model", ".spm", ".jinja", ".tiktoken", ".py")  # what belongs to a model beside weights


@dataclass(frozen=True)
class Ablations:
    """What models of mixes of P parts of the data would do, by the averages of the parts' models.

    Attributes:
        mixes: the numbers of each mix's parts.
        losses: (mixes,) of the mixes' averages; keep low.
        everything: the loss of the average over all parts.
        scores: (P,) how much larger the loss is without a part, averaged over the others, than with all: keep high.
    """

    mixes: tuple[tuple[int, ...], ...]
    losses: Floats
    everything: float
    scores: Floats


def average(sources: Sequence[Source], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The mean of models, tensor by tensor, on the host: summed in float64 in the order given, in the tensors' dtype.

    Of models that are files only one tensor at a time is in memory. What is equal in all stays to the bit. Integer
    tensors, a counter of batches say, must be equal.

    Args:
        sources: of one architecture, and trained from one start: see the method's page.
        weights: one above or equal to 0 for each, scaled to sum to 1; None: equal.

    Raises:
        TypeError, ValueError: no sources or something that is none, weights that are none, tensors of other names,
            shapes or dtypes, floats of one byte, files that are not what their names say.
    """
    return dict(_averaged(sources, weights))


def merge_files(
    sources: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], weights: Sequence[float] | None = None
) -> Path:
    """Average folders of models into a new folder: one weights file of the first is in memory at a time.

    Weights are cut into files as the first folder's are; its configuration, tokenizer and code are copied.

    Raises:
        ValueError: as ``average``; configurations that differ; an ``out`` that is there already.
    """
    out, folders = Path(out), [Path(os.fspath(source)) for source in sources]
    if os.path.lexists(out):  # also a link to nothing
        raise ValueError(f"out: {out} is there already; give the name of a new folder")
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"sources: expected folders of models, got {folder}")
    _check_configurations(folders)
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(_opened(folder)) for folder in folders]
        shares = _shares(opened, weights)
        temporary = out.with_name(f".{uuid.uuid4().hex}.tmp")
        temporary.mkdir(parents=True)
        try:
            for file, names in opened[0].files.items():
                tensors = {name: _mean(name, opened, shares) for name in names}
                require("safetensors.torch", "cli").save_file(tensors, temporary / file, {"format": "pt"})
            for path in sorted(folders[0].iterdir()):
                if path.is_file() and path.name.endswith(_BESIDE):
                    shutil.copyfile(path, temporary / path.name)
            os.rename(temporary, out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return out


def ablate(
    model: nn.Module,
    parts: Sequence[Source],
    loss: Callable[[nn.Module], float],
    mixes: Sequence[Sequence[int]],
    *,
    weights: Sequence[float] | None = None,
) -> Ablations:
    """The loss of each mix's averaged model, and of each part's absence.

    Args:
        model: of the parts' architecture; it lends its modules, and is not changed.
        parts: P models that were trained from one start on equally large parts of the data, one on each.
        loss: of a model, in eval mode, on what matters: keep low.
        mixes: the numbers of each mix's parts.
        weights: one per part, above 0: of parts that are not equally large, their sizes.

    Raises:
        TypeError, ValueError: as ``average``; fewer than two parts, a mix that is none, a loss that is not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    count = len(parts)
    if count < 2:
        raise ValueError(f"parts: expected two models at least, got {count}")
    chosen = tuple(tuple(rows_of(mix, count, f"mixes[{m}]").tolist()) for m, mix in enumerate(mixes))
    sizes = [1.0] * count if weights is None else finite(weights, "weights").tolist()
    if len(sizes) != count or min(sizes) <= 0:
        raise ValueError(f"weights: expected {count} numbers above 0, got {short(weights)}")
    known: dict[tuple[int, ...], float] = {}
    merged = copy.deepcopy(model)

    def measured(mix: tuple[int, ...]) -> float:
        key = tuple(sorted(mix))
        if key not in known:
            _load(merged, _averaged([parts[k] for k in key], [sizes[k] for k in key]))
            known[key] = float(loss(merged.eval()))  # whatever mode the last one left it in
            if not np.isfinite(known[key]):
                raise ValueError(f"loss: of parts {list(key)} expected a finite number, got {known[key]}")
        return known[key]

    losses = np.array([measured(mix) for mix in chosen], dtype=np.float64)
    everything = measured(tuple(range(count)))
    scores = np.array([measured(tuple(k for k in range(count) if k != p)) for p in range(count)]) - everything
    return Ablations(chosen, losses, everything, scores)


# ---- Tensors of several models


@dataclass(frozen=True)
class _Opened:
    """A model's tensors, read one at a time."""

    what: str
    files: Mapping[str, Sequence[str]]  # by file the names of its tensors; one nameless file of what is in memory
    get: Callable[[str], Tensor]

    @property
    def names(self) -> list[str]:
        return [name for names in self.files.values() for name in names]


def _averaged(sources: Sequence[Source], weights: Sequence[float] | None) -> Iterator[tuple[str, Tensor]]:
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(_opened(source)) for source in sources]
        shares = _shares(opened, weights)
        for name in opened[0].names:
            yield name, _mean(name, opened, shares)


def _shares(opened: Sequence[_Opened], weights: Sequence[float] | None) -> list[float]:
    """The weights of models of the same names, the largest 1: their sum neither overflows nor vanishes."""
    if not opened:
        raise ValueError("sources: expected one model at least, got none")
    first = set(opened[0].names)
    for other in opened[1:]:
        if differ := sorted(first ^ set(other.names)):
            raise ValueError(f"{other.what}: has other tensors than {opened[0].what}: {short(differ)} in one alone")
    if weights is None:
        return [1.0] * len(opened)
    shares = finite(weights, "weights")
    if shares.shape != (len(opened),) or shares.min() < 0 or not shares.max() > 0:
        raise ValueError(f"weights: expected {len(opened)} numbers of at least 0, not all 0, got {short(weights)}")
    scaled: list[float] = (shares / shares.max()).tolist()
    return scaled


def _mean(name: str, opened: Sequence[_Opened], shares: Sequence[float]) -> Tensor:
    """Σ w x / Σ w in float64; x itself where all are equal, which the rounding of sums may miss."""
    first = opened[0].get(name)
    if first.is_floating_point() and first.dtype.itemsize == 1:
        raise ValueError(
            f"{opened[0].what}: tensor {name!r} of {first.dtype} is quantised and has no mean apart from its scale; "
            "turn the models into bfloat16 or wider before"
        )
    if not first.is_floating_point():
        for other in opened[1:]:
            if not torch.equal(first, other.get(name)):
                raise ValueError(
                    f"{other.what}: tensor {name!r} of {first.dtype} differs from {opened[0].what}'s, and has no "
                    "mean; set it to one value in all models before"
                )
        return first.clone()
    total, alike = torch.zeros(first.shape, dtype=torch.float64), torch.ones(first.shape, dtype=torch.bool)
    kept: Tensor | None = None
    for model, share in zip(opened, shares, strict=True):
        own = model.get(name)
        if own.shape != first.shape or own.dtype != first.dtype:
            raise ValueError(
                f"{model.what}: tensor {name!r}: expected {first.dtype} {tuple(first.shape)} as in {opened[0].what}, "
                f"found {own.dtype} {tuple(own.shape)}"
            )
        if share:  # 0 · ∞ is no number
            total += own.double() * share
            kept = own if kept is None else kept
            alike &= own == kept
    mean = (total / sum(shares)).to(first.dtype)
    return mean if kept is None else torch.where(alike, kept, mean)


def _load(model: nn.Module, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Into the model's own storage, one tensor at a time."""
    own, loaded = model.state_dict(), set()
    places: dict[tuple[int, int], str] = {}
    for name, tensor in tensors:
        if name not in own or own[name].shape != tensor.shape:
            found = f"{tuple(own[name].shape)}" if name in own else "no such tensor"
            raise ValueError(f"model: expected tensor {name!r} {tuple(tensor.shape)} as in the parts, found {found}")
        place = (own[name].data_ptr(), tensor.numel())
        before = places.setdefault(place, name) if place[0] and place[1] else name
        if before != name and not torch.equal(own[name].cpu(), tensor.to(own[name].dtype)):
            raise ValueError(f"model: ties {name!r} to {before!r}, which differ in the parts; give one that does not")
        own[name].copy_(tensor)
        loaded.add(name)
    filled = {own[name].data_ptr() for name in loaded}
    # A file holds tied tensors once.
    if missing := [n for n, t in own.items() if n not in loaded and t.numel() and t.data_ptr() not in filled]:
        raise ValueError(f"parts: lack the model's tensors {short(missing)}")


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[_Opened]:
    if isinstance(source, (nn.Module, Mapping)):
        state = source.state_dict() if isinstance(source, nn.Module) else source
        tensors = {name: t for name, t in state.items() if isinstance(t, Tensor)}
        if len(tensors) != len(state):
            raise TypeError(f"sources: expected tensors by name, got {short(sorted(state.keys() - tensors.keys()))}")
        kind = type(source).__name__
        yield _Opened(f"the {kind}", {"": list(tensors)}, lambda name: tensors[name].detach().cpu())
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        with contextlib.ExitStack() as stack:
            files = {file.name: stack.enter_context(_safe(file)) for file in _weights_files(path)}
            names = {name: list(file.keys()) for name, file in files.items()}
            where = {tensor: file for file, tensors in names.items() for tensor in tensors}
            if len(where) != sum(map(len, names.values())):
                raise ValueError(f"{path}: a tensor is in two of its files")
            yield _Opened(str(path), names, lambda name: files[where[name]].get_tensor(name))
    else:
        raise TypeError(f"sources: expected models, states or paths, got {type(source).__name__}")


def _safe(path: Path) -> Any:
    try:
        return require("safetensors", "cli").safe_open(path, framework="pt")
    except Exception as error:  # of whatever class the library that reads it may choose
        raise ValueError(f"{path}: cannot be read as safetensors ({short(error)})") from error


def _weights_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / _WEIGHTS).is_file():
        return [path / _WEIGHTS]
    if not (path / _INDEX).is_file():
        raise ValueError(f"{path}: expected a .safetensors file, or a folder with {_WEIGHTS} or {_INDEX}")
    listed = _json(path / _INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"{path / _INDEX}: expected a weight_map from tensors to files, got {short(listed)}")
    names = sorted(set(listed.values()))
    if outside := [name for name in names if name != os.path.basename(name) or not (path / name).is_file()]:
        raise ValueError(f"{path / _INDEX}: names {short(outside)}, which are no files of that folder")
    return [path / name for name in names]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({short(error)})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object, got {type(found).__name__}")
    return found


def _check_configurations(folders: Sequence[Path]) -> None:
    known = [_decisive(_json(folder / _CONFIG)) if (folder / _CONFIG).is_file() else {} for folder in folders]
    for folder, own in zip(folders[1:], known[1:], strict=True):
        if differ := sorted(key for key in known[0].keys() | own.keys() if known[0].get(key) != own.get(key)):
            raise ValueError(f"{folder / _CONFIG}: differs from {folders[0] / _CONFIG} in {', '.join(differ)}")


def _decisive(config: Any) -> Any:
    """Without the keys that decide nothing, of parts' configurations as well."""
    if not isinstance(config, dict):
        return config
    return {key: _decisive(value) for key, value in config.items() if key not in _NO_MATTER}
