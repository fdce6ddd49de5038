"""`assay doctor`."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

import torch

import assay
from assay.cli.terminal import INCOMPLETE, OK, say

_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[^]]*\])?\s*(?:>=\s*([\d.]+))?[^;]*;\s*extra\s*==\s*[\"']([\w-]+)[\"']")
# What an extra is for; those of assay's own developers are not listed.
_EXTRAS = {
    "cli": "the command, recipes, compressed files, filters",
    "text": "language models and data sets of Hugging Face",
    "image": "image files",
    "gpu": "kernels on NVIDIA GPUs",
    "lance": "Lance files",
    "sql": "conditions on scores",
}


def doctor() -> int:
    """Print which devices, kernels and extras there are, and what installs those that are missing."""
    code = OK
    lines = [("assay", assay.__version__), ("python", platform.python_version()), ("torch", torch.__version__)]
    lines += [("", ""), ("devices", ""), *_devices(), ("", ""), ("kernels", "")]
    try:
        lines += _kernels()
    except (ImportError, AttributeError, OSError) as error:
        lines += [("  native", f"not available: {error}; build assay again (pip install --force-reinstall assay)")]
        code = INCOMPLETE
    lines += [("", ""), ("extras", ""), *_extras()]
    for key, value in lines:
        say(f"{key:16} {value}".rstrip())
    return code


def _devices() -> Iterator[tuple[str, str]]:
    yield "  cpu", f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    if not torch.cuda.is_available():
        build = (
            f"torch for CUDA {torch.version.cuda} finds none" if torch.version.cuda else "torch is built without CUDA"
        )
        yield "  cuda", f"no GPU: {build}"
        return
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        size, capability = facts.total_memory / 2**30, f"{facts.major}.{facts.minor}"
        yield f"  cuda:{i}", f"{facts.name}, {size:.0f} GiB, compute capability {capability}"


def _kernels() -> Iterator[tuple[str, str]]:
    facts = assay.ops.build_info()
    sets = facts["instruction_sets"].items()
    unusable = [name for name, state in sets if state != "usable"]
    rest = f" (not on this processor: {', '.join(unusable)})" if unusable else ""
    yield "  cpu", f"{facts['isa']}, {facts['threads']} threads{rest}"
    yield "  cuda", facts["cuda_kernels"]
    triton = _installed("triton")
    yield "  triton", f"triton {triton}" if triton else "triton is not installed: pip install 'assay[gpu]'"


def _extras() -> Iterator[tuple[str, str]]:
    """Each extra with its packages, as the installed distribution declares them."""
    packages: dict[str, list[tuple[str, str]]] = {}
    for line in requires("assay") or ():
        if (match := _REQUIREMENT.match(line)) and match[1] != "assay":
            packages.setdefault(match[3], []).append((match[1], match[2] or "0"))
    for extra, use in _EXTRAS.items():
        if extra not in packages:
            continue
        found = {name: _installed(name) for name, _ in packages[extra]}
        missing = [name for name, its in found.items() if its is None]
        old = [f"{name} {found[name]} (needs {least})" for name, least in packages[extra] if _older(found[name], least)]
        there = ", ".join(f"{name} {its}" for name, its in found.items() if its is not None)
        yield f"  {extra}", f"{use}: {there or 'nothing'}"
        for what, names in (("missing", missing), ("too old", old)):
            if names:
                yield "", f"{what}: {', '.join(names)}; pip install --upgrade 'assay[{extra}]'"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _older(found: str | None, least: str) -> bool:
    """Whether a version comes before another, by its numbers."""
    return found is not None and _numbers(found) < _numbers(least)


def _numbers(text: str) -> list[int]:
    head = re.match(r"[\d.]*", text)
    return [int(part) for part in head[0].split(".") if part] if head else []
