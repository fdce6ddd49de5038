"""The methods of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from assay.methods.base import Method
from assay.recipe.parts import Part, Registry
from assay.tasks import Task


class MethodSpec(Part):
    """One method of a recipe. Subclass it, and register the subclass, to bring methods of your own."""

    method: str

    def models_used(self) -> dict[tuple[str | int, ...], str]:
        """The names of the models it wants, by the key that names them."""
        raise NotImplementedError

    def build(self, models: Mapping[str, nn.Module], task: Task, seed: int) -> Method:
        """Make the method. ``models`` holds at least the models it named."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """The parameters that change scores."""
        return self.model_dump()


METHODS: Registry[MethodSpec] = Registry("method", "assay.methods")
register_method = METHODS.register


@METHODS.add("ensemble")
class EnsembleSpec(MethodSpec):
    """`assay.methods.Ensemble`: what several models think of a sample together."""

    method: Literal["ensemble"]
    models: Annotated[list[str], Field(min_length=1)]
    weights: list[float] | None = None
    name: str = "ensemble"

    def models_used(self) -> dict[tuple[str | int, ...], str]:
        return {("models", i): name for i, name in enumerate(self.models)}

    def build(self, models: Mapping[str, nn.Module], task: Task, seed: int) -> Method:
        from assay.methods import Ensemble

        return Ensemble([models[name] for name in self.models], task, weights=self.weights, name=self.name)


@METHODS.add("grad_mimic")
class GradMimicSpec(MethodSpec):
    """`assay.methods.GradMimic`: whether a sample's gradient leads from a model to a better one."""

    method: Literal["grad_mimic"]
    model: str
    reference: str
    layers: str | list[str] | None = None
    cosine: bool = False
    grad_norm: bool = False
    name: str = "mimic"

    def models_used(self) -> dict[tuple[str | int, ...], str]:
        return {("model",): self.model, ("reference",): self.reference}

    def build(self, models: Mapping[str, nn.Module], task: Task, seed: int) -> Method:
        from assay.methods import GradMimic

        return GradMimic(
            models[self.model],
            models[self.reference],
            task,
            layers=self.layers,
            cosine=self.cosine,
            grad_norm=self.grad_norm,
            name=self.name,
        )
