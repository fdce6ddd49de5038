"""Files that a shard's rows name: what they were when they were read, kept beside its score table, and whether they
still are. A changed one is a changed input, as the shard itself is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import repeat

import numpy as np
from pydantic import BaseModel, ConfigDict

from assay._json import dumps
from assay.corpus.errors import CorpusError
from assay.corpus.format import Mask
from assay.corpus.images import inner_path
from assay.corpus.layout import files_path
from assay.corpus.readers import columns_of, read
from assay.corpus.shards import Shard
from assay.corpus.storage import Fingerprint, Store, may_pass

NamedFiles = Mapping[str, Fingerprint | None]
"""By path relative to the corpus's root; None: it could not be read."""


def files_named(shard: Shard, column: str, rows: Mask | None = None) -> Iterator[str]:
    """The files that a shard's rows, or those of a mask, name in a column of images, relative to the corpus's root; of
    all rows none where one of them holds its image itself. An OSError or a ShardError if it cannot be read."""
    if shard.is_folder:  # of images: they are what it is made of
        return
    path = f"{column}.path"
    wanted = path if not shard.format.has_keys and path in columns_of(shard) else column
    for chunk in read(shard, [wanted], frozenset([wanted])):
        meant = repeat(True) if rows is None else rows[chunk.first : chunk.first + chunk.length].tolist()
        for value, is_meant in zip(chunk.columns[wanted], meant, strict=False):
            if rows is None and isinstance(value, bytes | list | np.ndarray):
                return
            if isinstance(value, dict):
                value = None if value.get("bytes") else value.get("path")
            if is_meant and isinstance(value, str) and (inner := inner_path(shard.folder, value)) is not None:
                yield inner


class FileFacts(BaseModel):
    """What a footer says of the files that a shard's rows name: how many, and the SHA-256 of their list."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    count: int
    sha256: str


def save_files(output: Store, shard: Shard, files: NamedFiles) -> FileFacts | None:
    """Write the list of a shard's files, or remove that of an earlier run where there are none.

    A CorpusError if a file of that name is somebody else's.
    """
    path = files_path(shard)
    _refuse_stranger(output, path)
    if not files:
        output.remove(path)
        return None
    with output.write(path) as file:
        for name, found in sorted(files.items()):
            # json escapes whatever is not ASCII, as in a list of quarantined rows.
            file.write(dumps({"path": name, **(found.to_json() if found else {})}).encode() + b"\n")
    return FileFacts(count=len(files), sha256=output.sha256(path))


def copy_files(source: Store, output: Store, shard: Shard, facts: FileFacts | None) -> None:
    """Write the list that lies in ``source``, or remove that of an earlier run where there is none."""
    path = files_path(shard)
    _refuse_stranger(output, path)
    if facts is None:
        output.remove(path)
    else:
        output.write_text(path, source.read_text(path))


def shards_with_files(output: Store, shards: Iterable[Shard]) -> set[Shard]:
    """Those whose rows named files when they were scored: one listing tells."""
    lists = {f"files/{path}" for path in Store(output.fs, output.full("files")).files()}
    return {shard for shard in shards if files_path(shard) in lists} if lists else set()


def files_then(output: Store, shard: Shard) -> frozenset[str]:
    """The files that a shard's rows named when it was scored, those that could not be read among them."""
    try:
        with output.open(files_path(shard)) as file:
            return frozenset(path for path, _ in map(_parsed, file))
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{output.full(files_path(shard))}: not a list of a shard's files; move it away") from error


def changed_file(output: Store, shard: Shard, facts: FileFacts | None) -> str | None:
    """What is the matter with the files that a shard named when it was scored; None if they are what they were."""
    if facts is None:
        return None
    try:
        if output.sha256(files_path(shard)) != facts.sha256:
            raise ValueError
        with output.open(files_path(shard)) as file:
            then = dict(map(_parsed, file))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if may_pass(error):
            raise
        return f"{files_path(shard)}, the list of the files that it names, is not the one that was written with it"
    now = shard.store.fingerprints(then)
    changed = [name for name, found in then.items() if now[name] != found]
    more = f" and {len(changed) - 1:,} more" if changed[1:] else ""
    return f"{changed[0]!r}{more}, which it names, has changed since it was scored" if changed else None


def _parsed(line: bytes) -> tuple[str, Fingerprint | None]:
    facts = json.loads(line)
    path = str(facts.pop("path"))
    return path, Fingerprint(**facts) if facts else None


def _refuse_stranger(output: Store, path: str) -> None:
    try:
        with output.open(path) as file:
            _parsed(file.readline(1 << 16))
    except (FileNotFoundError, NotADirectoryError):
        return
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"{output.full(path)}: not a list of a shard's files; move it away") from error
