"""Mixtures of real text that a Python installation with the project's requirements has, cut into pieces of bytes.

The files of the target domain are divided among the pool, the target set that methods see, a validation set and the
test set; identical pieces occur once. The first mixture's domain is docstrings of the standard library; sources are in
its pool without their docstrings, so that nothing of the target and test sets is in it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import sys
import sysconfig
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LENGTH = 128  # bytes of a piece
PER_FILE = 60  # pieces: no single file makes up a kind
TARGET = "docstring"
# Of the pool.
SHARES = {TARGET: 8, "manual": 4, "readme": 10, "source": 22, "test": 20, "header": 14, "table": 10, "record": 12}
# Of the files of the domain, by split. The pool gets the most: it must hold its share of the domain.
SPLITS = {"pool": 0.6, "target": 0.15, "validation": 0.05, "test": 0.2}


@dataclass(frozen=True)
class Mixture:
    """Kinds of text.

    Attributes:
        domain: the kind that is the target.
        shares: of the pool, by kind. A kind that the machine lacks leaves its share to the others.
        texts: the kind and the text of every file.
    """

    domain: str
    shares: Mapping[str, int]
    texts: Callable[[], Iterator[tuple[str, str]]]


@dataclass(frozen=True)
class Corpus:
    """Pieces of text as bytes, (N, LENGTH) int64, the kind of each of the pool's, and which kind is the domain."""

    pool: Tensor
    kinds: NDArray[np.str_]
    domain: str
    target: Tensor
    validation: Tensor
    test: Tensor

    @property
    def of_domain(self) -> NDArray[np.bool_]:
        """(N,): which pieces of the pool are."""
        found: NDArray[np.bool_] = self.kinds == self.domain
        return found

    @property
    def digest(self) -> str:
        """SHA-256 of all pieces, which other packages, or others' versions, change."""
        parts = (self.pool, self.target, self.validation, self.test)
        return hashlib.sha256(b"".join(part.to(torch.uint8).numpy().tobytes() for part in parts)).hexdigest()


def build(pool: int, target: int, validation: int, test: int, seed: int, mixture: Mixture | None = None) -> Corpus:
    """A random pool in the mixture's proportions (the library's, if none is given); every seed divides the target
    domain's files anew.

    Raises:
        ValueError: the machine has too little text for these sizes.
    """
    rng, mixture = np.random.default_rng(seed), mixture or LIBRARY
    by_kind = {kind: own for kind, own in files(mixture).items() if own}
    domain = by_kind.pop(mixture.domain)
    order = rng.permutation(len(domain))
    edges = np.cumsum([round(share * len(domain)) for share in SPLITS.values()])[:-1]
    parts = dict(zip(SPLITS, ([domain[i] for i in part] for part in np.split(order, edges)), strict=True))
    seen: set[bytes] = set()  # the small sets first: what they have is nowhere else
    held_out = {
        name: _draw(parts[name], size, seen, rng, f"{name} set")
        for name, size in (("test", test), ("target", target), ("validation", validation))
    }
    by_kind[mixture.domain] = parts["pool"]
    total = sum(mixture.shares[kind] for kind in by_kind)
    pieces, kinds = [], []
    for kind in sorted(by_kind):
        drawn = _draw(by_kind[kind], round(pool * mixture.shares[kind] / total), seen, rng, f"pool's share of {kind}")
        pieces.append(drawn)
        kinds += [kind] * len(drawn)
    shuffled = rng.permutation(len(kinds))
    return Corpus(torch.cat(pieces)[shuffled], np.array(kinds)[shuffled], mixture.domain, **held_out)


def _draw(files: list[bytes], count: int, seen: set[bytes], rng: np.random.Generator, what: str) -> Tensor:
    """``count`` pieces of the files, none twice and none that was drawn before -> (count, LENGTH)."""
    pieces = []
    for file in files:
        starts = np.arange(0, len(file) - LENGTH + 1, LENGTH)
        pieces += [file[s : s + LENGTH] for s in rng.permutation(starts)[:PER_FILE]]
    chosen: list[bytes] = []
    for i in rng.permutation(len(pieces)):
        if len(chosen) == count:
            break
        if (key := b" ".join(pieces[i].split())) not in seen:
            seen.add(key)
            chosen.append(pieces[i])
    if len(chosen) < count:
        raise ValueError(f"{what}: expected {count} pieces of {LENGTH} bytes, this machine has {len(chosen)}")
    return torch.from_numpy(np.frombuffer(b"".join(chosen), np.uint8).reshape(count, LENGTH).astype(np.int64))


def files(mixture: Mixture) -> dict[str, list[bytes]]:
    """Kind -> the text of each of its files, in the order of the shares."""
    found = _by_kind(mixture.texts)
    return {kind: found.get(kind, []) for kind in mixture.shares}


@functools.cache
def _by_kind(texts: Callable[[], Iterator[tuple[str, str]]]) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for kind, text in texts():
        data = text.encode("utf-8", errors="replace")
        if len(data) >= LENGTH:
            found.setdefault(kind, []).append(data)
    return {kind: _without_copies(own) for kind, own in found.items()}


def _without_copies(texts: list[bytes]) -> list[bytes]:
    return list({hashlib.blake2b(text).digest(): text for text in texts}.values())


def _texts() -> Iterator[tuple[str, str]]:
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library).parts
        if {"site-packages", "dist-packages", "idlelib", "lib2to3"} & set(inside) or inside[0] == "pydoc_data":
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        if inside[0] == "encodings":
            yield "table", source[len(source) // 3 :]  # the head is the same in every one
            continue
        if {"test", "tests"} & set(inside):
            yield "test", source
            continue
        docstrings, rest = apart(source)
        yield TARGET, docstrings
        yield "source", rest
    import pydoc_data.topics

    for topic in pydoc_data.topics.topics.values():
        yield "manual", topic
    for path in sorted(_headers().rglob("*.h"))[:1500]:
        yield "header", path.read_text(encoding="utf-8", errors="replace")
    for distribution in _installed():
        yield "readme", str(distribution.metadata.get_payload() or distribution.metadata.get("Description", ""))
        yield "record", distribution.read_text("RECORD") or ""
    names = [f"{i:04X};{unicodedata.name(chr(i), '')}" for i in range(sys.maxunicode // 8)]
    for start in range(0, len(names), 4096):
        yield "table", "\n".join(n for n in names[start : start + 4096] if not n.endswith(";"))


def _installed() -> list[importlib.metadata.Distribution]:
    """Of the installation itself: not what PYTHONPATH adds for an afternoon, nor this project, whose words change."""
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    found = [d for d in importlib.metadata.distributions(path=sorted(folders)) if d.metadata["Name"] != "assay"]
    return sorted(found, key=lambda d: d.metadata["Name"] or "")


def _headers() -> Path:
    """PyTorch's: Python's own are often not installed."""
    return Path(torch.__file__).parent / "include"


def apart(source: str) -> tuple[str, str]:
    """A module's docstrings, and its source without them."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return "", ""
    lines, found = source.splitlines(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            found.append(text)
            first = node.body[0]
            lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    return "\n\n".join(found), "\n".join(line for line in lines if line.strip())


LIBRARY = Mixture(TARGET, SHARES, _texts)
