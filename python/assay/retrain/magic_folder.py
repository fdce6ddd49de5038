"""A run's checkpoints and its way back on disk: whole files only, and only of the run that they are read for."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from assay._json import dumps
from assay._lazy import require
from assay.retrain.magic_optimizers import State
from assay.retrain.magic_training import Training

_RUN, _PROGRESS, _LOCK = "run.json", "progress.safetensors", ".lock"
_log = logging.getLogger("assay")
_STATE, _TEMPORARY = re.compile(r"state-(\d{9})\.safetensors"), re.compile(r"\.[0-9a-f]{32}\.tmp")


@dataclass
class Progress:
    """How far the way back has come.

    Attributes:
        step: the number of steps before the state that ``adjoints`` belong to; T at the beginning, 0 at the end.
        adjoints: one per target: the derivatives of its loss in every part of that state.
        in_weights: (targets, N) float64: the derivatives in the weights, summed over the steps behind.
        losses: (targets,) float64.
        smoothness: (directions,) float64.
        changes: (directions, 2, targets) float64, of the losses in the metasmoothness' runs; NaN: one diverged.
        final: (P,) the trained parameters.
        told: (looked at,) float64, the losses of some of the run's batches at these.
        digests: (T + 1,) int64 of every state.
    """

    step: int
    adjoints: list[State]
    in_weights: Tensor
    losses: Tensor
    smoothness: Tensor
    changes: Tensor
    final: Tensor
    told: Tensor
    digests: Tensor

    def tensors(self) -> dict[str, Tensor]:
        names = ("in_weights", "losses", "smoothness", "changes", "final", "told", "digests")
        parts = {f"adjoint{k}.{i}": part for k, own in enumerate(self.adjoints) for i, part in enumerate(own)}
        return {**{name: getattr(self, name) for name in names}, **parts}

    @classmethod
    def of(cls, step: int, tensors: Mapping[str, Tensor]) -> Progress:
        """Raises KeyError or TypeError where tensors are missing."""
        parts = sum(name.startswith("adjoint0.") for name in tensors)
        targets = range(len(tensors["losses"]))
        adjoints: list[State] = [tuple(tensors[f"adjoint{k}.{i}"] for i in range(parts)) for k in targets]
        rest = {name: t for name, t in tensors.items() if not name.startswith("adjoint")}
        return cls(step, adjoints, **rest)


class Folder:
    """A ``Store`` in a folder, held by one process at a time.

    Args:
        path: made where it is not there.
        facts: of what the run is made, by name, as digests.

    Raises:
        ValueError: the folder is another run's (it says what differs), or another process writes into it.
    """

    def __init__(self, path: str | os.PathLike[str], facts: Mapping[str, str]) -> None:
        self.path, self._facts = Path(path), dict(facts)
        self._run = hashlib.sha256(dumps(self._facts, sort_keys=True).encode()).hexdigest()
        self._files = require("safetensors.torch", "cli")
        self._device = torch.device("cpu")

    @contextlib.contextmanager
    def held(self, device: torch.device) -> Iterator[None]:
        """Nobody else writes; tensors that are read go to ``device``."""
        self._device = device
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / _LOCK, "wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"folder: another process is working in {self.path}; wait for it") from error
            except OSError:
                _log.warning("%s: this file system has no locks; see that nothing else writes into it", self.path)
            self._check_run()
            for name in os.listdir(self.path):
                if _TEMPORARY.fullmatch(name):  # of a process that was killed while it wrote
                    os.unlink(self.path / name)
            yield

    def steps(self) -> list[int]:
        return sorted(int(found[1]) for name in os.listdir(self.path) if (found := _STATE.fullmatch(name)))

    def put(self, step: int, state: State, digests: Tensor) -> None:
        parts = {f"part{i}": part for i, part in enumerate(state)}
        self._write(self._name(step), {**parts, "digests": digests[: step + 1].clone()}, step)

    def get(self, step: int) -> State:
        _, tensors = self._read(self._name(step))
        return tuple(tensors[f"part{i}"].to(self._device) for i in range(len(tensors) - 1))

    def drop(self, step: int) -> None:
        os.unlink(self.path / self._name(step))

    def digests(self) -> Tensor:
        """Of the states up to the last one kept, (steps + 1,) int64."""
        kept = self.steps()
        return self._read(self._name(kept[-1]))[1]["digests"] if kept else torch.zeros(0, dtype=torch.int64)

    def save(self, progress: Progress) -> None:
        self._write(_PROGRESS, progress.tensors(), progress.step)

    def progress(self) -> Progress | None:
        """What was saved last."""
        if not (self.path / _PROGRESS).exists():
            return None
        step, tensors = self._read(_PROGRESS)
        of_host = ("in_weights", "losses", "smoothness", "changes", "told", "digests")
        try:
            return Progress.of(step, {n: t if n in of_host else t.to(self._device) for n, t in tensors.items()})
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.path / _PROGRESS}: lacks {error}; delete the file") from error

    def _name(self, step: int) -> str:
        return f"state-{step:09d}.safetensors"

    def _write(self, name: str, tensors: Mapping[str, Tensor], step: int) -> None:
        metadata = {"run": self._run, "step": str(step)}
        whole = _apart(tensors)
        with self._renamed_when_complete(name) as temporary:
            self._files.save_file(whole, temporary, metadata)

    def _read(self, name: str) -> tuple[int, dict[str, Tensor]]:
        path = self.path / name
        try:
            with require("safetensors", "cli").safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except Exception as error:  # of whatever class the library that reads it may choose
            raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0][:100]}); delete the file") from error
        if metadata.get("run") != self._run:
            raise ValueError(f"{path}: belongs to another run; delete it, or choose another folder")
        return int(metadata["step"]), tensors

    def _check_run(self) -> None:
        path = self.path / _RUN
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            known = None
        except (ValueError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: is no description of a run; choose another folder") from error
        if known is None:
            with self._renamed_when_complete(_RUN) as temporary:
                temporary.write_text(dumps(self._facts, indent=1) + "\n", encoding="utf-8")
        elif known != self._facts:
            names = known.keys() | self._facts.keys() if isinstance(known, dict) else self._facts.keys()
            differ = [n for n in sorted(names) if not isinstance(known, dict) or known.get(n) != self._facts.get(n)]
            raise ValueError(
                f"folder: {self.path} belongs to another run, of other {', '.join(differ)}; choose another folder, or "
                "delete this one"
            )

    @contextlib.contextmanager
    def _renamed_when_complete(self, name: str) -> Iterator[Path]:
        temporary = self.path / f".{uuid.uuid4().hex}.tmp"
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, self.path / name)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        with contextlib.suppress(OSError):  # best effort: some file systems cannot sync a folder
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the host, and copied only where two share memory, which the format does not know."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        if own.untyped_storage().nbytes() != own.nbytes or own.untyped_storage().data_ptr() in seen:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        found[name] = own
    return found


def facts(
    training: Training, weights: Tensor, targets: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, str]:
    """What decides a run's derivatives, by name, as digests; what the losses compute is found out by replaying."""
    model = {
        name: t for part in (training.model.named_parameters(), training.model.named_buffers()) for name, t in part
    }
    modes = [module.training for module in training.model.modules()]
    own = {
        "model": [model, training.start, list(training.trained), modes],
        "data": (training.batch(rows) for rows in training.rows),
        "batches": training.rows,
        "optimizer": [repr(training.optimizer), training.rates, training.clip],
        "weights": weights,
        "targets": targets,
        "settings": {"rows_at_once": training.rows_at_once, "dropout_seed": training.dropout_seed, **settings},
    }
    return {"format": "3", **{name: _digest(value) for name, value in own.items()}}


def _digest(value: Any) -> str:
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    """Add a value, with its type and length, so that no two add the same."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        sha.update(f"{value.dtype}{tuple(value.shape)};".encode())
        sha.update(value.contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        sha.update(f"{value.dtype}{value.shape};".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        sha.update(f"mapping {len(value)};".encode())
        for key, item in value.items():
            _feed(sha, str(key))
            _feed(sha, item)
    elif isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        sha.update(f"text {len(text)};".encode() + text)
    elif isinstance(value, bytes):
        sha.update(f"bytes {len(value)};".encode() + value)
    elif isinstance(value, np.ndarray):
        _feed(sha, value.tolist())
    elif isinstance(value, np.generic):
        _feed(sha, value.item())
    elif value is None or isinstance(value, (bool, int, float)):
        sha.update(f"{value!r};".encode())
    elif isinstance(value, (list, tuple, Iterator)):
        sha.update(b"list;")
        for item in value:
            _feed(sha, item)
        sha.update(b"end;")
    else:
        raise TypeError(
            f"data: a batch holds a {type(value).__name__}, of which a folder cannot tell whether it is the same "
            "as before; expected tensors, arrays, texts, numbers, and lists or mappings of such"
        )
