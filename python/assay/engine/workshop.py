"""Everything that a recipe's shards are scored with: models, methods and encoder, loaded and fitted once."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from assay.corpus.footer import Identity
from assay.engine.batches import Budget
from assay.engine.devices import place, take
from assay.engine.drawing import draw_samples
from assay.engine.fitting import Together
from assay.engine.kept_features import FeatureMethod
from assay.engine.plan import Plan
from assay.engine.pool import Batches, samples_by_row
from assay.engine.shortlist import Shortlist
from assay.engine.timing import Times
from assay.methods import Column, Method, Scorer
from assay.methods.scorer import all_columns
from assay.probe.quiet import is_out_of_memory
from assay.recipe.errors import EngineError
from assay.recipe.models import build_models
from assay.recipe.recipe import Recipe
from assay.recipe.signatures import Given
from assay.recipe.tasks import Encoder, OwnShapes, ShowsTokens, with_columns_of
from assay.tasks.contrastive import NO_GRADIENTS

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Workshop:
    """What scores shards."""

    recipe: Recipe
    identity: Identity
    encoder: Encoder
    methods: Sequence[Method]
    """Fitted, in the recipe's order."""
    feature_methods: Mapping[int, FeatureMethod]
    """In place of the methods that keep their features, by their place in the recipe."""
    scorer: Scorer | None
    """Of the methods, or of what keeps their features; None if they are not fitted."""
    budget: Budget
    """What batches have found out about the memory."""
    times: Times = field(default_factory=Times)
    """What it was used for, so far."""
    shortlist: Shortlist | None = None
    """The rows that it scores, if not all; the recipe is then of what scores these alone."""

    @property
    def columns(self) -> list[Column]:
        """The columns of every table."""
        chose = self.shortlist.columns if self.shortlist else ()
        return [*(Column(**vars(column)) for column in chose), *self.own_columns]

    @property
    def own_columns(self) -> list[Column]:
        """Those of them that its methods give."""
        own = all_columns(self.methods)
        if self.shortlist is None:
            return own
        said = f"NaN beyond {self.shortlist.spec}"
        return [replace(column, description=f"{column.description}; {said}") for column in own]


def open_workshop(
    plan: Plan, fit: bool = True, device: torch.device = CPU, turn: tuple[int, int] | None = None
) -> Workshop:
    """Load a recipe's models, check that they, the task and the methods fit together, and ``fit`` the methods.

    The models, and what the methods learn of them, are on ``device``; scores come back from there. ``turn`` is this
    worker's number among those who fit the same, and how many they are; without one nothing is left in the output.
    """
    if plan.shortlist is not None:
        plan = replace(plan, recipe=plan.recipe.reranking())
    recipe = plan.recipe
    task = recipe.task.task() if recipe.task.asks_models else None
    take(device)
    make_encoder = recipe.task.open(recipe.models_used)
    models = build_models(recipe.models_used, recipe.task.auto_class, plan.identity.models)
    models = {name: place(name, model, device) for name, model in models.items()}
    encoder = with_columns_of(make_encoder(models), list(dict.fromkeys(recipe.own_columns.values())))
    together = None if turn is None else Together.of(plan, device, turn)
    views = _targets(plan, encoder, together)
    given = Given(models, task, {name: batches.plain for name, batches in views.items()}, recipe.seed, views)
    methods = []
    for i, spec in enumerate(recipe.methods):
        with _refusals(recipe, i):
            methods.append(spec.build(given))
    with _refusals(recipe):
        _refuse_names(all_columns(methods), plan.shortlist)
        feature_methods = _feature_methods(plan, methods, encoder)
        _refuse_unsupported(methods, encoder, set(recipe.own_columns.values()))
        Scorer([method for method in methods if not _fits(method)])  # it taps the models, which may be refused too
    scorer = None
    if fit:
        _fit(plan, methods, encoder, together)
        with _refusals(recipe):
            scorer = Scorer([feature_methods.get(i, m) for i, m in enumerate(methods)], inference=True)
    budget = Budget(recipe.batch.tokens)
    return Workshop(recipe, plan.identity, encoder, methods, feature_methods, scorer, budget, shortlist=plan.shortlist)


@contextmanager
def settled() -> Iterator[None]:
    """What lives already, as a workshop and the libraries it needs, is kept from the garbage collector until the block
    ends: every few thousand rows would make it look through all of that again, a third of the time rows take."""
    if gc.get_freeze_count():  # by whoever runs this
        yield
        return
    gc.collect(1)  # what is garbage would stay, too; all of it is looked for where memory runs out
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def open_encoder(recipe: Recipe) -> Encoder:
    """What makes samples of a recipe's rows, for its models as they are loaded for it."""
    make_encoder = recipe.task.open(recipe.models_used)
    return make_encoder(build_models(recipe.models_used, recipe.task.auto_class))


def _targets(plan: Plan, encoder: Encoder, together: Together | None) -> dict[str, Batches]:
    """Each target is read once, whoever wants it."""
    found = {}
    for name, target in plan.recipe.targets_used.items():
        samples = samples_by_row(f"targets.{name}", plan.corpora[target.path], encoder)
        found[name] = Batches(list(samples.values()), encoder, plan.recipe, together)
    return found


def _fit(plan: Plan, methods: Sequence[Method], encoder: Encoder, together: Together | None) -> None:
    recipe, samples = plan.recipe, []
    if recipe.uses_pool:
        corpus, count = plan.corpora[recipe.fitted_to()["fit"]], recipe.fit.samples
        samples = draw_samples(corpus, encoder, count, recipe.seed, together)
    pool = Batches(samples, encoder, recipe, together)
    for i, method in enumerate(methods):
        if together is not None:
            together.begin(str(i))
        torch.manual_seed(recipe.seed)  # for a method or model of one's own; ours have generators of their own
        with _refusals(recipe, i):
            method.fit(pool if recipe.methods[i].column_keys() else pool.plain)
            _refuse_gradients(method, encoder)


def _fits(method: Method) -> bool:
    """Whether the method learns something before it can tell what it needs."""
    return type(method).fit is not Method.fit


def _feature_methods(plan: Plan, methods: Sequence[Any], encoder: Encoder) -> dict[int, FeatureMethod]:
    specs = enumerate(plan.recipe.methods)
    return {
        i: FeatureMethod(methods[i], spec, plan.recipe, plan.identity, encoder.identity)
        for i, spec in specs
        if spec.stored_as is not None
    }


def _refuse_names(columns: Sequence[Column], shortlist: Shortlist | None) -> None:
    """ValueError if what scores a shortlist gives a column that is there already."""
    taken = {column.name for column in shortlist.columns} if shortlist else set()
    if twice := [column.name for column in columns if column.name in taken]:
        raise ValueError(
            f"column {twice[0]!r} comes from a method with a shortlist and from one without; give one of them another "
            "name"
        )


def _refuse_unsupported(methods: Sequence[Method], encoder: Encoder, read: Set[str]) -> None:
    """ValueError for what the contract allows and a recipe has no data or table for."""
    for method in methods:
        if any(column.width is None for column in method.columns) and not isinstance(encoder, ShowsTokens):
            raise ValueError(f"{method.name}: gives a number per token, and the task's samples are no tokens")
        if not _fits(method):
            _refuse_gradients(method, encoder)
        if not _fits(method) and any(set(need.raw) - read or need.view for need in method.needs().values()):
            raise ValueError(
                f"{method.name}: wants another view, or raw columns that no key of it (…_column) names, which a recipe "
                "does not give; use assay.score"
            )


def _refuse_gradients(method: Method, encoder: Encoder) -> None:
    """ValueError where a method wants them, and what shares a loss goes through the models in several passes."""
    if isinstance(encoder, OwnShapes) and encoder.apart and any(need.reductions for need in method.needs().values()):
        raise ValueError(NO_GRADIENTS)


@contextmanager
def _refusals(recipe: Recipe, i: int | None = None) -> Iterator[None]:
    where = "methods" if i is None else f"methods.{recipe.place(i)} ({recipe.methods[i].method})"
    try:
        yield
    except EngineError:
        raise
    except Exception as error:  # whatever a model or a method may raise
        if is_out_of_memory(error):
            raise EngineError(f"{where}: ran out of memory; take a smaller sketch or batch ({error})") from error
        what = str(error) if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: {error}"
        raise EngineError(f"{where}: {what}") from error
