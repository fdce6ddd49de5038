"""Everything that a recipe's shards are scored with: models, methods and encoder, loaded and fitted once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from assay.corpus.footer import Identity
from assay.engine.batches import is_out_of_memory, make_batches
from assay.engine.kept_features import Keeper
from assay.engine.plan import Plan
from assay.engine.pool import Batches, draw_samples, read_target
from assay.methods import Column, Method, Scorer
from assay.methods.scorer import all_columns
from assay.recipe.errors import EngineError
from assay.recipe.models import build_models
from assay.recipe.recipe import Recipe
from assay.recipe.targeted import CheckpointsSpec, FittedMethod, TargetedSpec
from assay.recipe.tasks import Encoded, Encoder
from assay.tasks import Task


@dataclass(frozen=True)
class Workshop:
    """Everything that a recipe's shards are scored with, loaded once."""

    recipe: Recipe
    identity: Identity
    task: Task
    models: Mapping[str, nn.Module]
    encoder: Encoder
    fitted: Mapping[int, Method]
    """The methods that are fitted before they score, by their place in the recipe: one fit serves all shards."""
    ready: bool = True
    """Whether they have been fitted."""

    def methods(self) -> list[Method]:
        """The recipe's methods, fresh: what they gather (a correlation, a warning) is about one shard."""
        torch.manual_seed(self.recipe.seed)
        return [
            self.fitted[i] if i in self.fitted else spec.build(self.models, self.task, self.recipe.seed)
            for i, spec in enumerate(self.recipe.methods)
        ]

    def keepers(self) -> dict[int, Keeper]:
        """The methods that keep their features, by their place in the recipe."""
        return {
            i: Keeper(self.fitted[i], spec, self.recipe, self.identity)
            for i, spec in enumerate(self.recipe.methods)
            if isinstance(spec, CheckpointsSpec) and spec.keep_features is not None
        }

    def columns(self) -> list[Column]:
        """The columns of every table. An EngineError if the methods refuse the models, or one another."""
        try:
            methods = self.methods()
            # It taps the models, which may be refused too.
            Scorer([method for i, method in enumerate(methods) if self.ready or i not in self.fitted])
            self.keepers()
            return all_columns(methods)
        except (ValueError, TypeError) as error:
            raise EngineError(f"methods: {error}") from error


def open_workshop(plan: Plan, fit: bool = True) -> Workshop:
    """Load a recipe's models, check that they, the task and the methods fit together, and ``fit`` the methods that
    look at targets or at the pool."""
    recipe, task = plan.recipe, plan.recipe.task.task()
    models = build_models(recipe.models_used)
    encoder = recipe.task.encoder({name: (recipe.models_used[name], model) for name, model in models.items()})
    fitted = _prepare(plan, models, task, encoder)
    workshop = Workshop(recipe, plan.identity, task, models, encoder, fitted, ready=False)
    workshop.columns()  # what can be refused before the work of fitting, is
    if fit and fitted:
        _fit(plan, fitted, encoder)
    workshop = replace(workshop, ready=fit)
    workshop.columns()
    return workshop


def _prepare(plan: Plan, models: Mapping[str, nn.Module], task: Task, encoder: Encoder) -> dict[int, FittedMethod]:
    """The methods to be fitted, with their targets; each target is read once, whoever wants it."""
    recipe, split = plan.recipe, partial(make_batches, limits=plan.recipe.batch)
    targets: dict[str, Batches] = {}
    for name, target in recipe.targets_used.items():
        targets[name] = Batches(read_target(name, plan.corpora[target.path], encoder), encoder, split)
    methods = {}
    for i, spec in enumerate(recipe.methods):
        if isinstance(spec, TargetedSpec):
            own = {name: targets[name] for name in spec.targets_of(recipe.targets)}
            with _refusals(i, spec.method):
                methods[i] = spec.build_fitted(models, task, recipe.seed, own)
    return methods


def _fit(plan: Plan, methods: Mapping[int, FittedMethod], encoder: Encoder) -> None:
    recipe = plan.recipe
    drawn: list[Encoded] = []
    if recipe.uses_pool:
        corpus = plan.corpora[recipe.fitted_to()["fit"]]
        drawn = draw_samples(corpus, encoder, recipe.fit.samples, recipe.seed)
    pool = Batches(drawn, encoder, partial(make_batches, limits=recipe.batch))
    for i, method in methods.items():
        torch.manual_seed(recipe.seed)  # labels may be drawn from the model
        with _refusals(i, recipe.methods[i].method):
            method.fit(pool)


@contextmanager
def _refusals(i: int, method: str) -> Iterator[None]:
    try:
        yield
    except EngineError:
        raise
    except Exception as error:  # whatever a model or a method may raise
        if is_out_of_memory(error):
            raise EngineError(
                f"methods.{i} ({method}): ran out of memory; take a smaller sketch or batch ({error})"
            ) from error
        what = str(error) if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: {error}"
        raise EngineError(f"methods.{i} ({method}): {what}") from error
