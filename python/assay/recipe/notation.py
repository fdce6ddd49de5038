"""YAML as recipes are written in it: no code, no key twice, and `1e-8` is a number.

PyYAML keeps to YAML 1.1, to which a number with an exponent has a point and a sign: `1e-8` would be a text.
"""

from __future__ import annotations

import re
from typing import IO, Any

import yaml

_FLOAT = "tag:yaml.org,2002:float"
_EXPONENT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error rather than a key lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r} appears twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts into quotes what the loader would read otherwise."""


for _own in (_Loader, _Dumper):
    _own.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+.0123456789"))


def parse(text: str | IO[str]) -> Any:
    """What a recipe, or the value of a key, says. A yaml.YAMLError, a ValueError or a RecursionError if it is none."""
    return yaml.load(text, _Loader)


def write(value: Any, **options: Any) -> str:
    """YAML that `parse` reads as the same; ``options`` as `yaml.dump` has them."""
    text: str = yaml.dump(value, Dumper=_Dumper, allow_unicode=True, **options)
    return text
