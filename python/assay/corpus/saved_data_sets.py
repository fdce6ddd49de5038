"""Hugging Face data sets saved to disk: what their state lists, and the files that make a data set of the shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from assay._json import dumps
from assay.corpus.errors import CorpusError
from assay.corpus.facts import features_of
from assay.corpus.storage import Store, may_pass

# What `save_to_disk` writes beside the Arrow files. The first marks a data set's folder.
STATE = "state.json"
INFO = "dataset_info.json"
SIDECARS = (STATE, INFO, "dataset_dict.json")


def listed_files(store: Store, state_path: str) -> list[str]:
    """The names of the Arrow files that a saved data set's state lists, in its own order.

    A CorpusError for what is no such state, or lists anything but plain names.
    """
    try:
        names = [entry["filename"] for entry in json.loads(store.read_text(state_path))["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if may_pass(error):
            raise
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise CorpusError(f"not the state of a saved data set ({what})") from error
    for name in names:
        if not isinstance(name, str) or "/" in name or "\0" in name or name in ("", ".", ".."):
            raise CorpusError(f"lists {name!r}; expected plain file names")
    return names


def features_beside(store: Store, folder: str) -> Mapping[str, Any] | None:
    """The features that a saved data set's description tells; None if the folder holds no such data set, or it
    tells none."""
    place = f"{folder}/" if folder else ""
    if not all(store.exists(place + name) for name in (STATE, INFO)):
        return None
    return features_of(json.loads(store.read_text(place + INFO))) or None


def copy_sidecars(sidecars: tuple[str, ...], source: Store, target: Store, rule: str) -> None:
    """Copy what makes Arrow files a saved data set, so that the curated copy loads as one.

    Its state gets a fingerprint of its own, since `datasets` caches results by it; sizes that are no longer
    true are left out. What is not an object in JSON is copied as it is.
    """
    for path in sidecars:
        text = source.read_text(path)
        target.write_text(path, _changed(path.rsplit("/", 1)[-1], text, rule))


def _changed(name: str, text: str, rule: str) -> str:
    try:
        content: Any = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(content, dict):
        return text
    if name == STATE:
        origin = f"{content.get('_fingerprint')}:{rule}"
        content["_fingerprint"] = hashlib.sha256(origin.encode()).hexdigest()[:16]
    if name == INFO:
        for stale in ("splits", "dataset_size", "size_in_bytes", "download_size"):
            content.pop(stale, None)
    return dumps(content, indent=2, ensure_ascii=False) + "\n"
