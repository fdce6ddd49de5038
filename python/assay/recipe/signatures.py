"""Keys of a recipe from constructors' signatures: a parameter's name, type and default are its key's."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import Field, create_model
from torch import nn

from assay.recipe.parts import Part
from assay.tasks import Task


@dataclass(frozen=True)
class Given:
    """What the parts of a recipe are built from, beside their own keys."""

    models: Mapping[str, nn.Module]
    task: Task | None
    targets: Mapping[str, Any]
    """Batches by the target's name."""
    seed: int
    views: Mapping[str, Any] | None = None
    """The same for methods that read columns of their own: ``methods.Views``. None: ``targets`` are."""
    own: Sequence[nn.Module] = ()
    """The models of the method that is being built, in the order in which it names them."""


@dataclass(frozen=True)
class Role:
    """What a value in a recipe stands for, where it is not the constructor's argument itself.

    Attributes:
        field: what pydantic checks the value against.
        make: the value, what the recipe is built from, and the value's place in its list -> the argument.
        identity: what of the value decides scores.
        implied: the key may be left out even where the argument may not.
    """

    field: Any
    make: Callable[[Any, Given, int], Any]
    identity: Callable[[Any], Any] = lambda value: value
    implied: bool = False


@dataclass(frozen=True)
class Key:
    """One key: a value, a list of values (``several``), or, where that is allowed, null."""

    name: str
    role: Role | None
    several: bool
    field: Any
    default: Any = None
    required: bool = False

    def argument(self, value: Any, given: Given) -> Any:
        """The constructor's argument."""
        if self.role is None or value is None:
            return value
        make = self.role.make
        return [make(item, given, i) for i, item in enumerate(value)] if self.several else make(value, given, 0)

    def identity(self, value: Any) -> Any:
        """What of the value decides scores, as plain JSON."""
        if self.role is None or value is None:
            return value
        return [self.role.identity(item) for item in value] if self.several else self.role.identity(value)


class DerivedPart(Part):
    """A part of a recipe whose keys are the parameters of a class's constructor."""

    constructor: ClassVar[type[Any]]
    keys: ClassVar[tuple[Key, ...]]

    def arguments(self, given: Given) -> dict[str, Any]:
        """The constructor's arguments; what a recipe leaves null is the constructor's own default."""
        values = ((key, getattr(self, key.name)) for key in self.keys)
        return {key.name: key.argument(value, given) for key, value in values if value is not None or key.required}


D = TypeVar("D", bound=DerivedPart)


def derive(cls: type[Any], base: type[D], roles: Mapping[Any, Role], but: Sequence[Any] = (), **fields: Any) -> type[D]:
    """A subclass of ``base`` for ``cls``; ``fields`` come before its keys. The rest is as in ``keys_of``."""
    keys = tuple(keys_of(cls.__init__, roles, but))
    for key in keys:
        needed = key.required and not (key.role and key.role.implied)
        fields[key.name] = (key.field, ... if needed else key.default)
    part = create_model(f"{cls.__name__}Spec", __base__=base, __doc__=cls.__doc__, **fields)
    part.constructor, part.keys = cls, keys
    return part


def keys_of(constructor: Callable[..., Any], roles: Mapping[Any, Role], but: Sequence[Any] = ()) -> Iterator[Key]:
    """The keys of a class.

    Args:
        constructor: its ``__init__``, typed.
        roles: by type, what is named in a recipe rather than given.
        but: types and names of parameters that are no keys.

    Raises:
        TypeError: a parameter whose type no key can have.
    """
    hints = get_type_hints(constructor)
    for parameter in list(inspect.signature(constructor).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            if constructor.__name__ == "__init__" and constructor.__module__ != "typing":
                raise TypeError(f"{constructor.__qualname__}: *{parameter.name} can be no key; name the parameters")
            continue  # a class without a constructor of its own
        hint = hints.get(parameter.name)
        if hint in but or parameter.name in but:
            continue
        options = _options(hint)
        given = [option for option in options if option is not type(None)]
        several = len(given) == 1 and get_origin(given[0]) is Sequence and get_args(given[0])[0] in roles
        role = roles.get(get_args(given[0])[0] if several else given[0])
        try:
            field = role.field if role else _union(map(_field, given))
        except TypeError as error:
            where = f"{constructor.__qualname__}: parameter {parameter.name!r}: {error}"
            raise TypeError(f"{where}; expected a text, a number, literals, or lists of them") from error
        if role and several:
            field = Annotated[list[field], Field(min_length=1)]  # type: ignore[valid-type]
        required, default = parameter.default is inspect.Parameter.empty, parameter.default
        if required or not isinstance(default, str | int | float | bool):
            default = None  # the constructor's own, which a recipe does not spell out
        nullable = type(None) in options or (default is None and not required)
        if nullable and default is not None:
            where = f"{constructor.__qualname__}: parameter {parameter.name!r}"
            raise TypeError(f"{where}: null and the default {default!r} cannot be told apart; let the default be None")
        yield Key(parameter.name, role, several, field | None if nullable else field, default, required)


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _union(hints: Iterable[Any]) -> Any:
    return Union[tuple(hints)]  # noqa: UP007  (made of what is known only here)


def _field(hint: Any) -> Any:
    """The same type as pydantic is to check it: sequences are lists."""
    if hint in (str, int, float, bool) or get_origin(hint) is Literal:
        return hint
    if get_origin(hint) is Sequence:
        return list[_field(get_args(hint)[0])]  # type: ignore[misc]
    raise TypeError(f"no key of a recipe can be {hint!r}")
