"""Recipes: what to score, with which models and methods, as one YAML file of typed keys."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from assay.corpus.layout import RETRIEVAL
from assay.recipe.errors import RecipeError
from assay.recipe.factories import check_trust
from assay.recipe.groups import expanded
from assay.recipe.methods import METHODS, MethodSpec, ShortlistSpec, model_keys
from assay.recipe.models import MODELS, ModelSpec
from assay.recipe.notation import parse, write
from assay.recipe.parts import AnyPath, CorpusPath, Part, located, nearest
from assay.recipe.tasks import TASKS, TaskSpec
from assay.recipe.tasks.text import TextSpec


class CorpusSpec(Part):
    """Where the shards are. Without an ``id_column`` a sample's id is ``<shard>:<row>``."""

    path: CorpusPath
    id_column: str | None = None


class TargetSpec(Part):
    """Samples of what the model is to become better at, of the recipe's own task."""

    path: CorpusPath


class FitSpec(Part):
    """The random sample that second moments and landmarks are taken from; without a path it is the corpus's."""

    samples: Annotated[int, Field(ge=2)] = 4096
    path: CorpusPath | None = None


class BatchSpec(Part):
    """How much is run at once: padded tokens and samples per batch. It does not change what a score means."""

    tokens: Annotated[int, Field(ge=1)] = 8192
    samples: Annotated[int, Field(ge=1)] = 256


class RaySpec(Part):
    """What the workers of ``--engine ray`` are.

    Attributes:
        address: of the cluster, as ``ray.init`` takes it; None: that of RAY_ADDRESS, or one started on this machine.
        workers: at most so many; None: as many as the cluster has room for when the run begins.
        min_workers: so many stay until the end; the others go when no unit is left for them.
        cpus, gpus: of each. A part of a GPU is shared by several, on which each holds the models.
    """

    address: str | None = None
    workers: Annotated[int, Field(ge=1)] | None = None
    min_workers: Annotated[int, Field(ge=1)] = 1
    cpus: Annotated[float, Field(gt=0)] = 1.0
    gpus: Annotated[float, Field(ge=0, le=1)] = 0.0


class RunSpec(Part):
    """Where it runs: ``auto``, or devices by name, a worker each; or a Ray cluster's workers. It does not change what a
    score means."""

    devices: str | Annotated[list[str], Field(min_length=1)] = "auto"
    ray: RaySpec = RaySpec()


class Recipe(Part):
    """A whole recipe, resolved: paths are absolute and every default is filled in."""

    version: Literal[1]
    corpus: CorpusSpec
    task: Annotated[SerializeAsAny[TaskSpec], BeforeValidator(TASKS.parse)]
    models: dict[str, Annotated[SerializeAsAny[ModelSpec], BeforeValidator(MODELS.parse)]] = Field(default_factory=dict)
    methods: Annotated[list[Annotated[SerializeAsAny[MethodSpec], BeforeValidator(METHODS.parse)]], Field(min_length=1)]
    output: AnyPath
    targets: dict[str, TargetSpec] = Field(default_factory=dict)
    fit: FitSpec = FitSpec()
    batch: BatchSpec = BatchSpec()
    run: RunSpec = RunSpec()
    seed: Annotated[int, Field(ge=0)] = 0

    _places: Sequence[int] = PrivateAttr(default=())
    _within: str | None = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _globs_of_models(cls, data: Any, info: ValidationInfo) -> Any:
        return expanded(data, (info.context or {}).get("base", ""), model_keys) if isinstance(data, Mapping) else data

    @model_validator(mode="after")
    def _models_know_their_names(self) -> Recipe:
        for name, spec in self.models.items():
            spec._name = name
        return self

    @model_validator(mode="after")
    def _models_are_defined(self) -> Recipe:
        for i, method in enumerate(self.methods):
            for key, name in method.models_used().items():
                if name not in self.models:
                    raise located(
                        ("methods", i, *key),
                        f"no model is called {name!r}; {nearest(name, self.models)}",
                        name,
                    )
        return self

    @model_validator(mode="after")
    def _targets_are_defined(self) -> Recipe:
        for i, method in enumerate(self.methods):
            named = method.targets_of(self.targets)
            for k, name in enumerate(named):
                if name not in self.targets:
                    hint = nearest(name, self.targets)
                    raise located(("methods", i, "targets", k), f"no target is called {name!r}; {hint}", name)
            if method.needs_target and not named:
                raise located(("methods", i, "targets"), "needs a target; define one under targets", named)
        return self

    @model_validator(mode="after")
    def _columns_are_named(self) -> Recipe:
        text = getattr(self.task, "text_column", None)
        for i, method in enumerate(self.methods):
            unnamed = [key for key, column in method.column_keys().items() if column is None]
            if unnamed and text is None:
                raise located(("methods", i, unnamed[0]), "is missing; the task has no text_column that it could be")
            self.methods[i] = method.model_copy(update=dict.fromkeys(unnamed, text))
        return self

    @model_validator(mode="after")
    def _task_is_one_for_its_methods(self) -> Recipe:
        asking = [("methods", i, *key) for i, method in enumerate(self.methods) for key in method.models_used()]
        reading = [i for i, method in enumerate(self.methods) if method.column_keys()]
        if asking and not self.task.asks_models:
            raise located(asking[0], f"no model has a loss on a task of kind {self.task.kind}; take another kind")
        if reading and not asking and self.task.asks_models:
            message = f"{self.task.kind} is about models, and no method runs one; expected text"
            raise located(("task", "kind"), message, self.task.kind)
        prompting = [i for i, method in enumerate(self.methods) if method.needs_prompts]
        if prompting and not self.task.has_prompts:
            message = (
                "is about responses behind prompts, and every token of a sample counts (task.loss_on: all); expected "
                "task.prompt_column with completion_column, or messages_column, and loss_on: completion"
            )
            raise located(("methods", prompting[0], "method"), message)
        if reading and self.task.group_rows is not None:
            message = f"scores rows one by one, and {self.task.kind} by groups of them; give it a recipe of its own"
            raise located(("methods", reading[0], "method"), message)
        return self

    @model_validator(mode="after")
    def _shortlist_is_one(self, info: ValidationInfo) -> Recipe:
        listed = [i for i, method in enumerate(self.methods) if method.shortlist is not None]
        for i in listed:
            method, first = self.methods[i], self.methods[listed[0]]
            if method.shortlist != first.shortlist:
                message = f"expected {first.shortlist}, as of {first.method}: a recipe has one shortlist, got"
                raise located(("methods", i, "shortlist"), f"{message} {method.shortlist}")
            if method.stored_as is not None:
                message = "holds every row's features, and a shortlist has few rows; leave out one of the two"
                raise located(("methods", i, "keep_features"), message, method.stored_as)
            if self.task.group_rows is not None:
                message = f"scores rows one by one, and {self.task.kind} by groups of them; leave it out"
                raise located(("methods", i, "shortlist"), message)
        if len(listed) == len(self.methods):
            message = "of every method; expected one without, by whose scores the shortlist is made"
            raise located(("methods", 0, "shortlist"), message)
        if self.shortlist is not None:
            self.shortlist._place = (info.context or {}).get("file", ""), f"methods.{listed[0]}.shortlist"
        return self

    @property
    def shortlist(self) -> ShortlistSpec | None:
        """The rows that some of its methods score, if these are not all."""
        return next((method.shortlist for method in self.methods if method.shortlist is not None), None)

    def retrieval(self) -> Recipe:
        """Of a recipe with a shortlist, the recipe of what every row is scored with. Its output lies in this one's.
        Where no model is asked, its samples are texts."""
        methods = [method for method in self.methods if method.shortlist is None]
        task, asking = self.task, any(method.models_used() for method in methods)
        columns = [str(column) for method in methods for column in method.column_keys().values()]
        if task.asks_models and columns and not asking:
            task = TextSpec(kind="text", text_column=getattr(task, "text_column", None) or columns[0])
        output = f"{self.output.rstrip('/')}/{RETRIEVAL}"
        part = self._part(methods, task=task, output=output)
        part._within = self.output
        return part

    def reranking(self) -> Recipe:
        """Of a recipe with a shortlist, the recipe of what its rows alone are scored with."""
        return self._part([method for method in self.methods if method.shortlist is not None])

    def _part(self, methods: list[MethodSpec], **update: Any) -> Recipe:
        part = self.model_copy(update={"methods": methods, **update})
        return part.with_places([self.place(self.methods.index(method)) for method in methods])

    def with_places(self, places: Sequence[int]) -> Recipe:
        """The same, of which ``place`` says these."""
        recipe = self.model_copy()
        recipe._places = places
        return recipe

    @property
    def outermost(self) -> str:
        """The output that was asked for, of which a retrieval's is a part."""
        return self._within or self.output

    def place(self, i: int) -> int:
        """Where its i-th method stands in the recipe that was read."""
        return self._places[i] if self._places else i

    @property
    def own_columns(self) -> dict[str, str]:
        """The columns that methods read, beside the task's: by the key that names them."""
        keys = [(f"methods.{i}", method.column_keys()) for i, method in enumerate(self.methods)]
        return {f"{where}.{key}": str(column) for where, own in keys for key, column in own.items()}

    @property
    def targets_used(self) -> dict[str, TargetSpec]:
        """The targets that some method is fitted to, in the recipe's order."""
        used = {name for method in self.methods for name in method.targets_of(self.targets)}
        return {name: spec for name, spec in self.targets.items() if name in used}

    def fitted_to(self) -> dict[str, str]:
        """The paths of the corpora that methods are fitted to, under ``targets.<name>`` and ``fit``."""
        targets = {f"targets.{name}": spec.path for name, spec in self.targets_used.items()}
        return targets | ({"fit": self.fit.path or self.corpus.path} if self.uses_pool else {})

    @property
    def uses_pool(self) -> bool:
        """Whether some method's scores depend on the sample that ``fit`` draws."""
        return any(method.uses_pool for method in self.methods)

    @property
    def models_used(self) -> dict[str, ModelSpec]:
        """The models that some method wants, in the recipe's order."""
        used = {name for method in self.methods for name in method.models_used().values()}
        return {name: spec for name, spec in self.models.items() if name in used}

    @property
    def trust(self) -> tuple[str, ...]:
        """The modules whose Python its models may run, as the caller allowed: what a copy of it needs as context."""
        return tuple(sorted({name for spec in self.models.values() for name in spec.trust}))

    def identity(self) -> dict[str, Any]:
        """The part that decides scores. Where files lie and how much is batched are not in it."""
        methods = [
            method.identity()
            | ({"targets": names} if (names := method.targets_of(self.targets)) else {})
            | ({"shortlist": method.shortlist.model_dump()} if method.shortlist else {})
            for method in self.methods
        ]
        identity = {
            "task": self.task.model_dump(),
            "id_column": self.corpus.id_column,
            "models": {name: spec.identity() for name, spec in self.models_used.items()},
            "methods": methods,
            "seed": self.seed,
        }
        return identity | ({"fit": {"samples": self.fit.samples}} if self.uses_pool else {})

    def to_yaml(self) -> str:
        """The resolved recipe, which loads as the same one."""
        return write(self.model_dump(), sort_keys=False)


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = (), trust: Sequence[str] = ()) -> Recipe:
    """Read a recipe; ``overrides`` are ``dotted.key=value``, in YAML. RecipeError says what is wrong.

    ``trust`` names the modules of Python that the recipe's models may be made by (``kind: python``): those modules, and
    the ones below them. No other is imported.
    """
    path = os.fspath(path)
    context = {"file": path, "base": os.path.dirname(os.path.abspath(path)), "trust": check_trust(trust)}
    try:
        with open(path, encoding="utf-8") as file:
            data = parse(file)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(path, "", f"cannot be read ({' '.join(str(error).split())})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of a date that is none, of brackets in brackets
        raise RecipeError(path, "", f"not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(data, dict):
        raise RecipeError(path, "", "expected a mapping of keys such as corpus, task, models, methods, output")
    for override in overrides:
        _override(path, data, override)
    try:
        return Recipe.model_validate(data, context=context)
    except ValidationError as error:
        raise _first_error(path, error) from error


def _override(path: str, data: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise RecipeError("", f"--set {override}", "expected dotted.key=value")
    try:
        value = parse(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError("", f"--set {override}", "the value is not valid YAML") from error
    target: Any = data
    last, rest = _first_key(target, dotted)
    while rest:
        target = _child(path, target, last, dotted)
        last, rest = _first_key(target, rest)
    if isinstance(target, list):
        target[_index(path, target, last, dotted)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise RecipeError(path, dotted, "cannot be set: what holds it is neither a mapping nor a list")


def _first_key(target: Any, dotted: str) -> tuple[str, str]:
    """A path's first key, and the rest: the longest that is there, as names may have dots; else up to the first one."""
    parts = dotted.split(".")
    counts = range(len(parts), 0, -1) if isinstance(target, dict) else ()
    count = next((count for count in counts if ".".join(parts[:count]) in target), 1)
    return ".".join(parts[:count]), ".".join(parts[count:])


def _child(path: str, target: Any, key: str, dotted: str) -> Any:
    """What a key holds, as a copy in its place: in YAML one mapping may stand in several (``&`` and ``*``)."""
    if isinstance(target, list):
        place: Any = _index(path, target, key, dotted)
        target[place] = copy(target[place])
        return target[place]
    if isinstance(target, dict):
        held = target.get(key)
        target[key] = {} if held is None else copy(held)
        return target[key]
    raise RecipeError(path, dotted, f"cannot be set: {key!r} is looked up in something that has no keys")


def _index(path: str, target: Sequence[Any], key: str, dotted: str) -> int:
    if not key.isdecimal() or int(key) >= len(target):
        raise RecipeError(path, dotted, f"cannot be set: {key!r} is no position in a list of {len(target)}")
    return int(key)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list) else reprlib.repr(value)


def _first_error(path: str, error: ValidationError) -> RecipeError:
    first, *others = error.errors(include_url=False)
    key = ".".join(map(str, first["loc"]))
    message = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "missing":
        message = "is missing"
    elif first["type"] not in ("assay", "missing_file"):
        message = f"{message}, got {_shown(first['input'])}"
    more = f" (and {len(others)} more)" if others else ""
    return RecipeError(path, key, message + more)
