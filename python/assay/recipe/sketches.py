"""The random projections of a recipe: their keys are the fields of `assay.ops`'s sketches."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, SerializeAsAny, model_validator

from assay.ops import Sketch
from assay.recipe.parts import Registry, located
from assay.recipe.signatures import DerivedPart, Given, Role, derive


class SketchSpec(DerivedPart):
    """A random projection; its seed is the recipe's."""

    kind: str

    @model_validator(mode="after")
    def _can_be_built(self) -> SketchSpec:
        try:
            self.build(Given({}, None, {}, 0))
        except (ValueError, TypeError) as error:
            raise located((), str(error), self) from error
        return self

    def build(self, given: Given) -> Any:
        """The sketch."""
        return self.constructor(**self.arguments(given), seed=given.seed)


SKETCHES: Registry[SketchSpec] = Registry("kind")
SKETCH = Role(
    Annotated[SerializeAsAny[SketchSpec], BeforeValidator(SKETCHES.parse)],
    lambda spec, given, _: spec.build(given),
    lambda spec: spec.model_dump(),
)
ROLES = dict.fromkeys(get_args(Sketch), SKETCH)
for _sketch in get_args(Sketch):
    _kind = _sketch.__name__.lower()
    SKETCHES.register(_kind, derive(_sketch, SketchSpec, ROLES, ("seed", "name"), kind=(Literal[_kind], ...)))
