"""A mix as a file of YAML has it: bands of worth, and a rate for each, perhaps by group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from assay._lazy import require
from assay.corpus.errors import CorpusError
from assay.corpus.storage import Store
from assay.select.mixing import check_bands, check_rates

_MOST_BYTES = 4 << 20
_EXAMPLE = """bands: [0, 50, 90, 100] and rates: {wiki: [0, 1, 2.5], "*": [0, 0.2, 1]}"""


@dataclass(frozen=True)
class Mix:
    """``bands`` and ``rates`` as `select.mix` takes them."""

    bands: tuple[float, ...]
    rates: tuple[float, ...] | Mapping[str | None, tuple[float, ...]]

    def to_json(self) -> dict[str, Any]:
        """The same, of which a group without a name is null."""
        rates: Any = list(self.rates)
        if isinstance(self.rates, Mapping):
            rates = [{"group": name, "rates": list(own)} for name, own in self.rates.items()]
        return {"bands": list(self.bands), "rates": rates}


def read_mix(url: str) -> Mix:
    """Read a mix. CorpusError, with the file and the key, for anything else."""
    yaml = require("yaml", "cli")
    store = Store.at(url)
    try:
        with store.open("") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"larger than {_MOST_BYTES >> 20} MiB")
        root = yaml.compose(content.decode("utf-8-sig"), yaml.SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CorpusError(f"--mix {url}: cannot be read ({' '.join(str(error).split())[:300]})") from error
    try:
        parts = _mapping(root, "it")
        if set(parts) != {"bands", "rates"}:
            raise ValueError(f"has the keys {', '.join(map(str, parts)) or 'none'}; expected {_EXAMPLE}")
        bands = _numbers(parts["bands"], "bands")
        check_bands(bands)
        if parts["rates"].id == "sequence":
            rates: Any = _numbers(parts["rates"], "rates")
            check_rates("all rows", rates, len(bands) - 1)
        else:
            rates = {name: _numbers(node, f"rates.{name}") for name, node in _mapping(parts["rates"], "rates").items()}
            for name, own in rates.items():
                check_rates(name, own, len(bands) - 1)
    except ValueError as error:
        raise CorpusError(f"--mix {url}: {error}") from error
    return Mix(bands, rates)


def _mapping(node: Any, what: str) -> dict[str | None, Any]:
    """By their texts as they are written, for `no` is a language, and 1 a number of a topic; a plain null is None."""
    if node is None or node.id != "mapping":
        raise ValueError(f"{what} is no mapping; expected {_EXAMPLE}")
    found: dict[str | None, Any] = {}
    for key, value in node.value:
        if key.id != "scalar":
            raise ValueError(f"{what}: a key is no text; expected {_EXAMPLE}")
        name = None if key.tag == "tag:yaml.org,2002:null" else key.value
        if name in found:
            raise ValueError(f"{what}: the key {key.value!r} appears twice")
        found[name] = value
    return found


def _numbers(node: Any, what: str) -> tuple[float, ...]:
    if node.id != "sequence" or not all(item.id == "scalar" for item in node.value):
        raise ValueError(f"{what}: expected a list of numbers; as in {_EXAMPLE}")
    return tuple(_number(item.value, what) for item in node.value)


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{what}: {text!r} is no number") from None
