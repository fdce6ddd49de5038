"""Which devices a run may use, what each worker gets of the machine, and models on their device."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn

from assay.recipe.errors import EngineError


def find_devices(wanted: str | Sequence[str]) -> list[torch.device]:
    """The devices that ``run.devices`` names: ``auto``, or devices by name, one worker each.

    ``auto`` is every GPU that torch sees, else the CPU, once.

    Raises:
        EngineError: no such device, or one that is not there, or devices that do not give the same bits.
    """
    names = [part.strip() for part in wanted.split(",")] if isinstance(wanted, str) else list(wanted)
    gpus = torch.cuda.device_count()
    if names == ["auto"]:
        return [torch.device("cuda", i) for i in range(gpus)] or [torch.device("cpu")]
    devices = [_device(name, gpus) for name in names]
    kinds = {device.type for device in devices}
    if len(kinds) > 1:
        raise EngineError(
            "run.devices: cpu and cuda round differently, so that a score would tell where it was made; name one kind"
        )
    for device in devices:
        if device.type == "cuda" and devices.count(device) > 1:
            raise EngineError(f"run.devices: {device} is named twice; it takes one worker")
    return devices


def _device(name: str, gpus: int) -> torch.device:
    kind, colon, index = name.partition(":")
    if name == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or (colon and not index.isdecimal()) or not index.isascii():
        raise EngineError(f"run.devices: {name!r} is no device; expected auto, cpu, or GPUs such as cuda:0,cuda:1")
    number = int(index or 0)
    if number >= gpus:
        seen = "no GPU" if not gpus else "cuda:0" if gpus == 1 else f"cuda:0 to cuda:{gpus - 1}"
        raise EngineError(f"run.devices: cuda:{number} is not there; torch sees {seen} (`assay doctor` tells more)")
    return torch.device("cuda", number)


def threads_each(workers: int) -> int:
    """How many threads each of several workers computes with: this process's, shared out."""
    return max(1, torch.get_num_threads() // workers)


def limit_threads(threads: int) -> None:
    """Let this process compute, and cut texts into tokens, with so many threads."""
    torch.set_num_threads(threads)
    os.environ["RAYON_NUM_THREADS"] = str(threads)


def take(device: torch.device) -> None:
    """Make a GPU the one that this process's kernels are launched on."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def place(name: str, model: nn.Module, device: torch.device) -> nn.Module:
    """A model on its device. EngineError, with its name, if it does not fit there."""
    if device.type == "cpu":
        return model
    try:
        return model.to(device)
    except torch.OutOfMemoryError as error:
        text = " ".join(str(error).split())
        raise EngineError(f"models.{name}: does not fit into the memory of {device} ({text})") from error
