"""Typed parts of a recipe, and plugins for them.

A part names its kind (``kind: mlp``, ``method: ensemble``), and the kind decides which keys it has. A plugin
is a subclass of `ModelSpec` or `MethodSpec`, registered by `register_model` or `register_method`, or found
under its kind's name in the entry-point group ``assay.models`` or ``assay.methods``. An entry point is
imported only when a recipe names its kind.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


def located(key: tuple[str | int, ...], message: str, value: Any = None) -> ValidationError:
    """A validation error at ``key`` below the part that raises it; pydantic adds the way there."""
    detail = InitErrorDetails(
        type=PydanticCustomError("assay", "{message}", {"message": message}), loc=key, input=value
    )
    return ValidationError.from_exception_data("recipe", [detail])


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest of the known names, or all of them if none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(map(repr, known)) or 'none'}"


class Part(BaseModel):
    """A mapping in a recipe: exactly these keys, exactly these types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _unknown_keys_first(cls, data: Any) -> Any:
        # A misspelt key is also a missing one; the misspelling is what its author wants to hear about.
        if not isinstance(data, Mapping | cls):
            message = f"should be a mapping of {', '.join(cls.model_fields)}"
            raise PydanticCustomError("mapping", "{message}", {"message": message})
        if isinstance(data, Mapping):
            for key in data:
                if key not in cls.model_fields:
                    raise located((str(key),), f"unknown key; {nearest(str(key), cls.model_fields)}", data[key])
        return data


def _absolute(path: str, info: ValidationInfo) -> str:
    base = (info.context or {}).get("base", "")
    return path if "://" in path else os.path.abspath(os.path.join(base, os.path.expanduser(path)))


def existing(path: str) -> str:
    """The path, if something is there. For use as a pydantic validator."""
    if not os.path.exists(path):
        raise PydanticCustomError("missing_file", "{message}", {"message": f"no such file or folder: {path}"})
    return path


def is_pattern(path: str) -> bool:
    """Whether a path, or a name, may stand for several."""
    return bool(re.search(r"[*?[]", path))


def _existing_unless_pattern(path: str) -> str:
    return path if "://" in path or is_pattern(path) else existing(path)


AnyPath = Annotated[str, AfterValidator(_absolute)]
"""A local path, relative to the recipe's folder, or an fsspec URL."""

ExistingPath = Annotated[str, AfterValidator(_absolute), AfterValidator(existing)]
"""A local path that must exist."""

CorpusPath = Annotated[AnyPath, AfterValidator(_existing_unless_pattern)]
"""A file, a folder, a glob or a URL that `assay.corpus.shards.find_shards` looks through."""

P = TypeVar("P", bound=Part)


class Registry(Generic[P]):
    """The known kinds of one part of a recipe."""

    def __init__(
        self, tag: str, group: str | None = None, spec_of: Callable[[str, type[Any]], type[P]] | None = None
    ) -> None:
        self._tag = tag
        self._group = group
        self._spec_of = spec_of
        self._classes: dict[str, type[Any]] = {}
        self._specs: dict[str, type[P]] = {}

    def register(self, kind: str, cls: type[Any]) -> None:
        """Make ``kind`` known, as a part or as a class that ``spec_of`` makes one of. Registering it again with another
        class is a ValueError."""
        if self._classes.setdefault(kind, cls) is not cls:
            raise ValueError(f"{self._tag} {kind!r} is already registered as {self._classes[kind].__qualname__}")
        self._specs[kind] = cls if self._spec_of is None or issubclass(cls, Part) else self._spec_of(kind, cls)

    def find(self, kind: Any) -> type[P] | None:
        """The part of a kind, if there is one that can be used; `parse` says what is wrong with it otherwise."""
        if not isinstance(kind, str):
            return None
        with contextlib.suppress(ValidationError):
            return self._specs.get(kind) or self._plugin(kind)
        return None

    def add(self, kind: str) -> Callable[[type[P]], type[P]]:
        """`register` as a decorator."""

        def decorate(spec: type[P]) -> type[P]:
            self.register(kind, spec)
            return spec

        return decorate

    def parse(self, value: Any, info: ValidationInfo) -> P:
        """Validate a mapping as the kind that it names. For use as a pydantic validator."""
        if isinstance(value, Part):
            return value  # type: ignore[return-value]
        if not isinstance(value, Mapping):
            raise PydanticCustomError("mapping", "{message}", {"message": "should be a mapping"})
        kind = value.get(self._tag)
        if not isinstance(kind, str):
            raise located((self._tag,), f"is missing; {nearest('', self._specs)}", kind)
        spec = self._specs.get(kind) or self._plugin(kind)
        if spec is None:
            raise located((self._tag,), f"unknown {self._tag} {kind!r}; {nearest(kind, self._specs)}", kind)
        return spec.model_validate(value, context=info.context)

    def _plugin(self, kind: str) -> type[P] | None:
        if self._group is None:
            return None
        try:
            for point in entry_points(group=self._group, name=kind):
                self.register(kind, point.load())
        except Exception as error:  # whatever a stranger's module may raise
            message = f"the plugin of {self._tag} {kind!r} cannot be used ({type(error).__name__}: {error})"
            raise located((self._tag,), message, kind) from error
        return self._specs.get(kind)
