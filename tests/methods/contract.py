"""What every method promises, checked on a small world. A method is made from its constructor's types alone.

``python -m pytest tests/methods/test_contract.py`` holds every method that ``assay.methods`` exports to it. For one of
your own: ``from tests.methods.contract import CHECKS, WORLDS`` and call each check with its class.
"""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_type_hints

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

import assay
from assay.methods import AdamState, Kernel, Method, Views
from assay.methods.base import samples_gathered
from assay.methods.parts import Make, State
from assay.methods.targets import Targets
from assay.ops import Kronecker, Sketch
from assay.recipe.methods import LIVE, METHODS
from assay.recipe.signatures import Given
from assay.tasks import CausalLM, Classification, Judge, Regression, Task

SAMPLES = 24
QUICK = {"steps": 1, "iterations": 2}  # parameters that cost time alone, by name
NOTHING = torch.full((5,), torch.nan)
BROKEN = 5  # the sample whose data are damaged, where a check damages one


class Classifier(nn.Module):
    """A layer of it is used by a few samples only, and in a batch of others by nobody; a parameter is no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.extra, self.head = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 3)
        self.shift = nn.Parameter(0.1 * torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        hidden, few = self.first(x) + self.shift, (x[:, 0] > 0.5).float()[:, None]
        if bool(few.any()):
            hidden = hidden + few * self.extra(x)
        out: Tensor = self.head(hidden.tanh())
        return out


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(input_ids).cumsum(1).tanh())
        return out


@dataclass(frozen=True)
class World:
    """A task, three models that descend from one another, and ``SAMPLES`` samples; of raw columns neither."""

    task: Task | None
    models: Sequence[nn.Module]
    samples: Sequence[Any]
    collate: Callable[[Sequence[Any]], Any]
    broken: Any
    """A sample of which nothing can be known."""
    predicts: bool = True
    """Whether something is predicted of it."""

    def batches(self, order: Sequence[int], size: int, samples: Sequence[Any] | None = None) -> list[Any]:
        chosen = [(samples or self.samples)[i] for i in order]
        return [self.collate(chosen[start : start + size]) for start in range(0, len(chosen), size)]

    @cached_property
    def pool(self) -> list[Any]:
        return self.batches(range(SAMPLES), 10)

    @property
    def damaged(self) -> list[Any]:
        return [self.broken if i == BROKEN else sample for i, sample in enumerate(self.samples)]

    @property
    def targets(self) -> dict[str, list[Any]]:
        return {"a": self.batches(range(3), 2), "b": self.batches(range(3, 7), 4)}

    @cached_property
    def states(self) -> list[AdamState]:
        generator = torch.Generator().manual_seed(7)
        return [
            AdamState(*({n: torch.rand(p.shape, generator=generator) for n, p in m.named_parameters()} for _ in "mv"))
            for m in self.models
        ]

    def make(self, method: type[Any], **options: Any) -> Any:
        """The method, each required argument by its type; ``options`` by name."""
        parameters = list(inspect.signature(method.__init__).parameters.values())[1:]
        hints = get_type_hints(method.__init__)
        modules = iter(self.models)
        needed = [p.name for p in parameters if p.default is p.empty or hints[p.name] == Targets | None]
        arguments = {name: self._argument(hints[name], modules) for name in needed if name not in options}
        quick = {name: value for name, value in QUICK.items() if name in hints}
        return method(**{**arguments, **quick, **options})

    def _argument(self, hint: Any, modules: Iterator[nn.Module]) -> Any:
        if hint is nn.Module:
            return next(modules)
        known = {
            **dict.fromkeys((Task, CausalLM, Judge, Regression), self.task),
            Targets: self.targets,
            Targets | None: self.targets,
            Sequence[nn.Module]: self.models[:2],
            Sequence[AdamState] | None: self.states[:2],
            AdamState: next(iter(self.states), None),
            Sequence[float]: [0.5, 1.0],
            Sketch: Kronecker(4, 4),
            Kernel: Kernel(damping=0.1),
        }
        return next(value for key, value in known.items() if key == hint)

    def every(self, method: type[Any]) -> Any:
        """The method with every column that it can give."""
        parameters = inspect.signature(method.__init__).parameters.values()
        given = {p.name: True for p in parameters if p.default is False and p.name != "skip_unsupported"}
        if not isinstance(self.task, CausalLM):
            given.pop("tokens", None)
        return self.make(method, **given)


def _models(make: Callable[[], nn.Module]) -> list[nn.Module]:
    torch.manual_seed(0)
    models = [make() for _ in range(3)]
    for k, model in enumerate(models[1:], 1):
        for p, start in zip(model.parameters(), models[0].parameters(), strict=True):
            p.data = start.data + 0.1 * k * p.data
    return models


def classification() -> World:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(SAMPLES, 5, generator=generator), torch.randint(3, (SAMPLES,), generator=generator)
    return World(
        Classification(),
        _models(Classifier),
        list(zip(x, y, strict=True)),
        lambda samples: (torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])),
        (NOTHING, y[BROKEN]),
    )


def texts() -> World:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 9, (SAMPLES,), generator=generator).tolist()

    def collate(samples: Sequence[Tensor]) -> dict[str, Tensor]:
        padded = nn.utils.rnn.pad_sequence(list(samples), batch_first=True)
        lengths = torch.tensor([len(sample) for sample in samples])
        return {"input_ids": padded, "attention_mask": (torch.arange(padded.shape[1]) < lengths[:, None]).long()}

    samples = [torch.randint(11, (length,), generator=generator) for length in lengths]
    return World(CausalLM(), _models(LanguageModel), samples, collate, torch.tensor([4]), predicts=False)


def columns() -> World:
    """Samples that no model looks at: their raw columns."""
    generator = torch.Generator().manual_seed(4)
    words = ["gold", "ore", "assay", "the", "of", "is", "a", "furnace", "touchstone", "weight", "lead", "silver"]
    lengths = torch.randint(5, 12, (SAMPLES,), generator=generator).tolist()
    samples = [" ".join(words[i] for i in torch.randint(12, (n,), generator=generator)) for n in lengths]
    return World(None, (), samples, lambda samples: Views(None, raw={"text": list(samples)}), None)


def responses() -> World:
    """Texts behind a prompt of one token."""
    world = texts()

    def collate(samples: Sequence[Tensor]) -> dict[str, Tensor]:
        batch = world.collate(samples)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch | {"labels": labels.index_fill(1, torch.tensor([0]), -100)}

    return replace(world, samples=[torch.cat([own[:1], own]) for own in world.samples], collate=collate)


def questions() -> World:
    """Texts behind which a judge says 1 or 2, or 3."""
    world = texts()

    def collate(samples: Sequence[Tensor]) -> dict[str, Tensor]:
        yes, no = torch.tensor([[1, 2, 3]]).repeat(len(samples), 1).split([2, 1], 1)
        return world.collate(samples) | {"yes": yes, "no": no}

    return replace(world, task=Judge(), collate=collate, broken=torch.zeros(0, dtype=torch.int64))


class Regressor(Classifier):
    """One number per sample."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]


def numbers() -> World:
    world, generator = classification(), torch.Generator().manual_seed(5)
    y = torch.randn(SAMPLES, generator=generator)
    samples = [(x, own) for (x, _), own in zip(world.samples, y, strict=True)]
    return replace(world, task=Regression(), models=_models(Regressor), samples=samples, broken=(NOTHING, y[BROKEN]))


WORLDS = {make.__name__: make for make in (classification, texts, columns, responses, questions, numbers)}
# Where methods live whose constructors name a task.
OF_ONE_TASK = {CausalLM: "responses", Judge: "questions", Regression: "numbers"}


def lives_in(method: type[Any], world: str) -> bool:
    """Whether a world has what the method looks at."""
    hints = get_type_hints(method.__init__)
    if hints.get("task") in OF_ONE_TASK or world in OF_ONE_TASK.values():
        return OF_ONE_TASK.get(hints.get("task")) == world
    return (world == "columns") != bool({nn.Module, Sequence[nn.Module]} & set(hints.values()))


def exported() -> list[type[Any]]:
    """Every method that ``assay.methods`` exports."""
    values = (getattr(assay.methods, name) for name in assay.methods.__all__)
    return [value for value in values if isinstance(value, type) and value is not Method and Method in value.__mro__]


def scores(method: Method, batches: Sequence[Any]) -> dict[str, np.ndarray]:
    table = assay.score(batches, [method])
    return {column.name: _numbers(table[column.name]) for column in method.columns}


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """(N,), (N, width), or of a number per token (N, T) with NaN behind the last."""
    values = column.to_pylist()
    if pa.types.is_list(column.type):
        longest = max(map(len, values))
        values = [[*row, *[np.nan] * (longest - len(row))] for row in values]
    return np.array(values, dtype=np.float64)


def assert_close(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        scale = float(np.nanmax(np.abs(values), initial=1e-6))
        np.testing.assert_allclose(got[name], values, rtol=1e-3, atol=1e-3 * scale, err_msg=name)


def constructor_does_no_work(method: type[Any], world: World) -> None:
    def run(*_: Any) -> None:
        raise AssertionError("the constructor ran a model")

    handles = [model.register_forward_pre_hook(run) for model in world.models]
    before = [{n: p.clone() for n, p in model.named_parameters()} for model in world.models]
    made = world.every(method)
    for handle in handles:
        handle.remove()
    held = [value for value in vars(made).values() if isinstance(value, Tensor) and value.numel() > 0]
    assert not held, "the constructor made tensors"
    for model, parameters in zip(world.models, before, strict=True):
        assert all(torch.equal(p, parameters[n]) and p.requires_grad for n, p in model.named_parameters())


def scoring_before_fit_is_refused(method: type[Any], world: World) -> None:
    made = world.make(method)
    if method.fit is Method.fit:
        assert made.fit(world.pool) is made
        return
    with pytest.raises(RuntimeError, match=rf"{made.name}: call fit\(\) before scoring"):
        scores(made, world.pool)
    assert made.fit(world.pool) is made


def a_fit_that_fails_or_is_a_copys_changes_nothing(method: type[Any], world: World) -> None:
    if method.fit is Method.fit:
        return
    made = world.make(method).fit(world.pool)
    expected = scores(made, world.pool)
    copy.copy(made).fit(world.pool[:2])
    targets, nothing = getattr(made, "targets", None), [world.collate([world.broken, world.broken])]
    if targets is not None:
        made.targets = replace(targets, batches=dict.fromkeys(targets.batches, nothing))
    with pytest.raises(ValueError, match=made.name):
        made.fit(world.pool[:2] if targets is not None else nothing)
    made.targets = targets
    for name, values in scores(made, world.pool).items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


def fit_looks_at_the_pool_only_as_it_says(method: type[Any], world: World) -> None:
    if not method.uses_pool:
        assert_close(
            scores(world.make(method).fit(), world.pool), scores(world.make(method).fit(world.pool), world.pool)
        )


@dataclass(frozen=True)
class InParts:
    """Batches each of which is a part; their states come out of files, and are made in their order or from behind."""

    batches: Sequence[Any]
    size: int
    step: int

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def states(self, make: Make, given: State) -> Iterator[State]:
        files = [io.BytesIO() for _ in self.batches]
        for i in range(len(files))[:: self.step]:
            torch.save(make([self.batches[i]], i * self.size), files[i])
        return (torch.load(io.BytesIO(file.getvalue()), weights_only=True) for file in files)


def a_fit_in_parts_is_the_same_whoever_makes_them(method: type[Any], world: World) -> None:
    if method.fit is Method.fit:
        return
    targets, asks = world.batches(range(7), 4), "targets" in inspect.signature(method.__init__).parameters

    def fitted(pool: Any, target: Any) -> dict[str, np.ndarray]:
        return scores(world.make(method, **({"targets": {"a": target}} if asks else {})).fit(pool), world.pool)

    forwards, backwards = (fitted(InParts(world.pool, 10, step), InParts(targets, 4, step)) for step in (1, -1))
    for name, values in forwards.items():
        np.testing.assert_array_equal(backwards[name], values, err_msg=name)
    assert_close(forwards, fitted(world.pool, targets))


def columns_are_as_promised(method: type[Any], world: World) -> None:
    made = world.every(method).fit(world.pool)
    promised = {column.name: column for column in made.columns}
    assert len(promised) == len(made.columns), "two columns of one name"
    given: list[dict[str, Tensor]] = []
    score = made.score
    made.score = lambda signals: given.append(score(signals)) or given[-1]
    table = assay.score(world.pool, [made])
    assert table.column_names == ["row", "id", *promised]
    for values in given:
        assert values.keys() == promised.keys()
    for name, column in promised.items():
        assert column.keep in ("high", "low", "none")
        assert column.description
        field = table.schema.field(name)
        length = -1 if column.width is None else column.width
        assert field.type == (pa.float32() if length == 1 else pa.list_(pa.float32(), length))
        assert len(table[name]) == SAMPLES
    assert any(np.isfinite(_numbers(table[name])).all() for name in promised)


def any_batching_gives_the_same_scores(method: type[Any], world: World) -> None:
    made = world.every(method).fit(world.pool)
    expected = scores(made, world.batches(range(SAMPLES), SAMPLES))
    for size in (1, 7):
        assert_close(scores(made, world.batches(range(SAMPLES), size)), expected)
    backwards = scores(made, world.batches(range(SAMPLES)[::-1], 5))
    assert_close({name: values[::-1] for name, values in backwards.items()}, expected)


def a_broken_row_stays_alone(method: type[Any], world: World) -> None:
    made, rest = world.every(method).fit(world.pool), [i for i in range(SAMPLES) if i != BROKEN]
    expected = scores(made, world.pool)
    got = scores(made, world.batches(range(SAMPLES), 10, world.damaged))
    assert_close({n: v[rest] for n, v in got.items()}, {n: v[rest] for n, v in expected.items()})
    for name, values in got.items():
        assert np.isnan(values[BROKEN]).all(), f"{name} of a row of which nothing is known is {values[BROKEN]}"
    refitted = scores(world.every(method).fit(world.batches(range(SAMPLES), 10, world.damaged)), world.pool)
    tokens = {column.name for column in made.columns if column.width is None}
    for name, values in refitted.items():
        fine = np.isfinite(values).any(1) if name in tokens else np.isfinite(values)
        assert fine.all(), f"{name} after a fit with one broken row"


def a_fit_says_how_many_samples_it_left_out(method: type[Any], world: World) -> None:
    """Of the pool and of the targets, whichever it looks at; or refuses them. Unlabelled ones are none of them."""
    if method.fit is Method.fit:
        return
    asks = "targets" in inspect.signature(method.__init__).parameters
    kinds = [kind for kind, looks in (("left_out", method.uses_pool), ("targets_left_out", asks)) if looks]

    def left_out(samples: Sequence[Any]) -> dict[str, str]:
        targets = {"targets": {"a": world.batches(range(7), 4, samples)}} if asks else {}
        facts = world.make(method, **targets).fit(world.batches(range(SAMPLES), 10, samples)).metadata()
        return {kind: facts.get(kind, "0") for kind in kinds}

    assert kinds
    assert left_out(world.samples) == dict.fromkeys(kinds, "0")
    try:
        damaged = left_out(world.damaged)
    except ValueError as refused:
        if "expected a finite" not in str(refused):
            raise
    else:
        assert damaged == dict.fromkeys(kinds, str(int(world.predicts)))


def the_same_input_gives_the_same_bits(method: type[Any], world: World) -> None:
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)  # nobody draws from the global generator
        made = world.every(method).fit(world.pool)
        runs += [scores(made, world.pool), scores(made, world.pool)]
    for name, values in runs[0].items():
        for other in runs[1:]:
            np.testing.assert_array_equal(other[name], values, err_msg=name)


def metadata_is_text(method: type[Any], world: World) -> None:
    made = world.every(method)
    for _ in range(2):
        facts = made.metadata()
        assert all(isinstance(key, str) and isinstance(value, str) for key, value in facts.items())
        scores(made.fit(world.pool), world.pool)


def metadata_gathers_no_more_than_it_says(method: type[Any], world: World) -> None:
    """Else parts of a shard could not be scored apart."""
    made = world.every(method).fit(world.pool)
    before = made.metadata()
    scores(made, world.pool)
    if samples_gathered(made) == 0:
        assert made.metadata() == before


def remedies_exist(method: type[Any], world: World) -> None:
    """What the probe's errors recommend can be given to whoever takes gradients."""
    keywords = inspect.signature(method.__init__).parameters.keys()
    if any(need.reductions for need in world.make(method).fit(world.pool).needs().values()):
        assert {"layers", "skip_unsupported"} <= keywords


def its_constructor_is_its_recipes_keys(method: type[Any], world: World) -> None:
    spec = METHODS._specs[method.__module__.rpartition(".")[2]]
    parameters = list(inspect.signature(method.__init__).parameters.values())[1:]
    models, hints = {f"m{i}": model for i, model in enumerate(world.models)}, get_type_hints(method.__init__)
    keys = [p.name for p in parameters if p.name not in ("task", "seed") and hints[p.name] not in LIVE]
    assert [key.name for key in spec.keys] == keys
    names = iter(models)
    options = {name: value for name, value in {"optimizers": None, **QUICK}.items() if name in hints}
    in_recipe = {
        Sequence[nn.Module]: ["m0", "m1"],
        Sketch: {"kind": "kronecker", "rows": 4, "cols": 4},
        Kernel: {"damping": 0.1},
        Sequence[float]: [0.5, 1.0],
    }
    values = {
        p.name: next(names) if hints[p.name] is nn.Module else in_recipe[hints[p.name]]
        for p in parameters
        if p.default is p.empty and p.name != "task" and hints[p.name] != Targets and p.name not in options
    }
    made = spec.model_validate({"method": method.__module__.rpartition(".")[2], **values, **options}).build(
        Given(models, world.task, world.targets, seed=0)
    )
    assert type(made) is method
    same = world.make(method, **options)
    assert_close(scores(made.fit(world.pool), world.pool), scores(same.fit(world.pool), world.pool))


CHECKS: list[Callable[[type[Any], World], None]] = [
    constructor_does_no_work,
    scoring_before_fit_is_refused,
    a_fit_that_fails_or_is_a_copys_changes_nothing,
    fit_looks_at_the_pool_only_as_it_says,
    a_fit_in_parts_is_the_same_whoever_makes_them,
    columns_are_as_promised,
    any_batching_gives_the_same_scores,
    a_broken_row_stays_alone,
    a_fit_says_how_many_samples_it_left_out,
    the_same_input_gives_the_same_bits,
    metadata_is_text,
    metadata_gathers_no_more_than_it_says,
    remedies_exist,
    its_constructor_is_its_recipes_keys,
]
