"""The methods of a recipe: what a constructor takes in Python, its key takes in a recipe."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import BeforeValidator, Field, PrivateAttr, TypeAdapter, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError
from torch import nn

from assay import methods
from assay.methods import AdamState, Method
from assay.methods.base import Keeper
from assay.methods.influence import Kernel
from assay.methods.targets import Targets
from assay.recipe.errors import RecipeError
from assay.recipe.models import file_sha256
from assay.recipe.parts import ExistingPath, Part, Registry
from assay.recipe.signatures import DerivedPart, Given, Role, derive
from assay.recipe.sketches import ROLES as SKETCH_ROLES
from assay.tasks import Task


class KernelSpec(DerivedPart):
    """How features become scores."""


class OptimizerSpec(Part):
    """The state of an Adam optimiser: a path, or a path and the constants that its file does not hold."""

    path: ExistingPath
    betas: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    eps: float | None = None

    def load(self, given: Given, place: int) -> AdamState:
        """The state; its parameters' names follow from the model that it belongs to."""
        model = given.own[place] if place < len(given.own) else None
        return AdamState.load(self.path, model=model, betas=self.betas, eps=self.eps)

    def identity(self) -> Any:
        """The file's content, and what was said beside it."""
        said = self.model_dump(exclude={"path"}, exclude_none=True)
        digest = f"sha256:{file_sha256(self.path)}"
        return said | {"file": digest} if said else digest


def _optimizer(value: Any, info: ValidationInfo) -> OptimizerSpec:
    if isinstance(value, str):
        return OptimizerSpec(path=PATH.validate_python(value, context=info.context))
    return OptimizerSpec.model_validate(value, context=info.context)


PATH: TypeAdapter[str] = TypeAdapter(ExistingPath)
MODEL = Role(str, lambda name, given, _: given.models[name])
TARGETS = Role(list[str] | None, lambda names, given, _: None, implied=True)  # the recipe's, unless some are named
OPTIMIZER = Role(
    Annotated[OptimizerSpec, BeforeValidator(_optimizer)],
    lambda spec, given, place: spec.load(given, place),
    lambda spec: spec.identity(),
)
KERNEL = Role(
    derive(Kernel, KernelSpec, {}),
    lambda spec, given, _: Kernel(**spec.arguments(given)),
    lambda spec: spec.model_dump(),
)
ROLES: dict[Any, Role] = {
    nn.Module: MODEL,
    Targets: TARGETS,
    AdamState: OPTIMIZER,
    Kernel: KERNEL,
    **SKETCH_ROLES,
}
LIVE = (torch.optim.Optimizer | None, dist.ProcessGroup | None)
"""A trainer's own objects: no file holds one, and a method goes without."""


class ShortlistSpec(Part):
    """The rows that a method scores, where it scores few: the best ``top`` (an integer is a number of rows, a decimal a
    share of them) by the column ``by``, which a method without a shortlist gives."""

    by: str
    top: int | float

    _place: tuple[str, str] = PrivateAttr(default=("", "shortlist"))
    """The recipe's file, and where in it this stands."""

    @field_validator("top", mode="before")
    @classmethod
    def _is_an_amount(cls, top: Any) -> Any:
        number = isinstance(top, int | float) and not isinstance(top, bool)
        if not number or not (top >= 1 if isinstance(top, int) else 0 < top <= 1):
            message = "expected a number of rows, such as 1000, or a share of them, such as 0.01"
            raise PydanticCustomError("assay", "{message}, got {top}", {"message": message, "top": reprlib.repr(top)})
        return top

    def wrong(self, message: str) -> RecipeError:
        """An error of ``by``, of which one knows only when the methods are made."""
        file, place = self._place
        return RecipeError(file, f"{place}.by", message)

    def __str__(self) -> str:
        return f"the top {self.top} by {self.by}"


class MethodSpec(Part):
    """One method of a recipe. Subclass it, and register the subclass, for a method whose keys are not its constructor's
    parameters; ``build`` is what has to be written."""

    method: str
    shortlist: ShortlistSpec | None = None
    """The rows that it scores, if not all: the others have NaN. `Recipe.identity` has it, ``identity`` not."""

    uses_pool: ClassVar[bool] = False
    """Whether ``fit`` looks at the pool's sample, so that scores depend on it."""
    needs_prompts: ClassVar[bool] = False
    """Whether it says nothing of samples all of whose tokens count."""
    needs_target: ClassVar[bool] = False

    def models_used(self) -> dict[tuple[str | int, ...], str]:
        """The names of the models it uses, by the key that names them."""
        return {}

    @classmethod
    def model_keys(cls) -> dict[str, bool]:
        """The keys that name models, and whether each takes several."""
        return {}

    def column_keys(self) -> dict[str, str | None]:
        """By key the columns of its own that it reads; None: the task's text."""
        return {}

    def targets_of(self, defined: Iterable[str]) -> list[str]:
        """Which of the recipe's targets it is about."""
        return []

    def build(self, given: Given) -> Method:
        """Make the method, not fitted yet."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """The parameters that change scores."""
        return self.model_dump(exclude={"shortlist"})

    @property
    def stored_as(self) -> str | None:
        """The type of numbers in which its features are kept, if they are."""
        return None


class DerivedSpec(DerivedPart, MethodSpec):
    """A method whose keys are the parameters of its constructor."""

    @classmethod
    def model_keys(cls) -> dict[str, bool]:
        return {key.name: key.several for key in cls.keys if key.role is MODEL}

    def models_used(self) -> dict[tuple[str | int, ...], str]:
        used: dict[tuple[str | int, ...], str] = {}
        for key in self.keys:
            value = getattr(self, key.name)
            if key.role is MODEL and value is not None:
                used |= {(key.name, i): name for i, name in enumerate(value)} if key.several else {(key.name,): value}
        return used

    def column_keys(self) -> dict[str, str | None]:
        return {key.name: getattr(self, key.name) for key in self.keys if key.name.endswith("_column")}

    def targets_of(self, defined: Iterable[str]) -> list[str]:
        for key in self.keys:
            if key.role is TARGETS:
                chosen: list[str] | None = getattr(self, key.name)
                return list(defined) if chosen is None else chosen
        return []

    def build(self, given: Given) -> Method:
        own = [given.models[name] for name in self.models_used().values()]
        arguments = self.arguments(replace(given, own=own))
        targets = given.views if self.column_keys() and given.views is not None else given.targets
        for key in self.keys:
            if key.role is TARGETS:
                arguments[key.name] = {name: targets[name] for name in self.targets_of(targets)}
        shared = inspect.signature(self.constructor).parameters.keys() & {"task", "seed"}
        method: Method = self.constructor(**arguments, **{name: getattr(given, name) for name in shared})
        return method

    def identity(self) -> dict[str, Any]:
        values = {key.name: key.identity(getattr(self, key.name)) for key in self.keys if key.role is not TARGETS}
        # Rounding changes scores. What keeps nothing has the identity that it had before there was the key.
        return {"method": self.method, **values, **({"keep_features": kept} if (kept := self.stored_as) else {})}

    @property
    def stored_as(self) -> str | None:
        return getattr(self, "keep_features", None)


def derived(kind: str, method: type[Any]) -> type[DerivedSpec]:
    """The keys of a method's class. TypeError if a parameter of its constructor can be no key: write a `MethodSpec`."""
    fields: dict[str, Any] = {"method": (Literal[kind], ...)}
    if issubclass(method, Keeper):  # new targets can be scored from stored features
        fields["keep_features"] = (Literal["float32", "float16", "bfloat16", "int8"] | None, None)
    spec = derive(method, DerivedSpec, ROLES, (Task, "task", "seed", *LIVE), **fields)
    spec.uses_pool = getattr(method, "uses_pool", False)
    spec.needs_prompts = getattr(method, "needs_prompts", False)
    spec.needs_target = any(key.role is TARGETS and key.required for key in spec.keys)
    return spec


def model_keys(method: Any) -> dict[str, bool]:
    """Of a method's kind: the keys that name models, and whether each takes several."""
    spec = METHODS.find(method)
    return spec.model_keys() if spec else {}


METHODS: Registry[MethodSpec] = Registry("method", "assay.methods", derived)
register_method = METHODS.register
for _name in methods.__all__:
    _class = getattr(methods, _name)
    if Method in getattr(_class, "__mro__", ())[1:]:
        register_method(_class.__module__.rpartition(".")[2], _class)  # the name of its file
