"""From data and a model to a recipe: which task, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from assay.corpus.errors import CorpusError, ShardError
from assay.corpus.readers import columns_of, read
from assay.corpus.shards import Corpus, Shard, find_shards
from assay.recipe.draft.columns import Columns
from assay.recipe.draft.models import ModelFacts, model_facts
from assay.recipe.draft.readings import Reading, readings
from assay.recipe.draft.writing import Choices, write
from assay.recipe.errors import EngineError

# What transformers calls the models of each use.
_WANTED = {
    "causal_lm": "a causal language model (…ForCausalLM, or .gguf)",
    "text classification": "a …ForSequenceClassification",
    "image classification": "a …ForImageClassification",
    "token_classification": "a …ForTokenClassification",
    "contrastive": "a CLIP-like model of images and texts",
    "numbers": "linear layers in one safetensors file (kind: mlp)",
}


@dataclass(frozen=True)
class Draft:
    """A recipe as text, and what is to be said of it."""

    text: str
    notes: tuple[str, ...]
    score: str
    """The column that its first question is answered by."""


def draft_recipe(
    data: str,
    model: str | None,
    reference: str | None = None,
    target: str | None = None,
    out: str = "recipe.yaml",
) -> Draft:
    """A recipe for the corpus ``data`` and a model, in which paths are relative to where ``out`` lies.

    Columns, config and headers are looked at; no model is loaded and nothing is downloaded.

    Raises:
        CorpusError: there is no corpus, or its columns allow no task.
        EngineError: there is no model, or it does not fit the columns.
    """
    corpus = find_shards(data)
    shard, columns = _first_columns(corpus)
    possible = readings(columns)
    if not possible:
        raise CorpusError(
            f"{data}: nothing in its columns is text, images, numbers with labels, or a conversation: "
            f"{columns.described()} ({shard.path})"
        )
    if model is None:
        raise EngineError(f"--model is missing: {data} has {columns.described()}; {_needed(possible)}")
    facts = model_facts(model)
    taken, notes = _choose(data, columns, possible, facts)
    other = _reference(facts, reference)
    further = other is not None and facts.shapes is not None and facts.shapes == other.shapes
    _check_labels(taken, facts, columns)
    if target is not None:
        _check_target(target, taken)
    choices = Choices(data, facts, taken, out, further, other, target, _id_column(shard, columns))
    text, score = write(choices)
    return Draft(text, tuple(notes), score)


def _first_columns(corpus: Corpus) -> tuple[Shard, Columns]:
    """The first shard that can be looked into, and its columns."""
    fault = ""
    for shard in corpus.shards:
        try:
            facts = columns_of(shard)
        except (ShardError, OSError) as error:
            fault = fault or f" ({shard.path}: {error})"
            continue
        if facts:
            return shard, Columns(facts)
    raise CorpusError(f"{corpus.store.url}: no shard of it can be looked into{fault}")


def _needed(possible: Sequence[Reading]) -> str:
    """Which models would do, for each way to read the columns."""
    ways = [f"for {reading.task} ({reading.why}) give {_WANTED[reading.use]}" for reading in possible]
    return "; ".join(dict.fromkeys(ways))


def _choose(data: str, columns: Columns, possible: Sequence[Reading], model: ModelFacts) -> tuple[Reading, list[str]]:
    """The reading that the model can be asked about, and notes on the others."""
    fit = [reading for reading in possible if reading.use == model.use and _fits(reading, model)]
    if not fit:
        chat = [reading for reading in possible if reading.chat and model.use == reading.use]
        if chat:
            raise EngineError(
                f"{model.path}: its tokenizer has no chat_template, and {chat[0].why}; take the chat model's "
                "tokenizer, or write the conversations out as texts"
            )
        said = f"is {model.name}" + (f" with {model.outputs} outputs" if model.outputs else "")
        why = "which no task of a recipe scores with" if model.use == "unknown" else f"for which {data} has no columns"
        raise EngineError(f"{model.path}: {said}, {why}; {_needed(possible)}")
    taken, *others = fit
    notes = [f"task: {taken.task}, because {taken.why}, and {model.path} is {model.name}"]
    notes += [f"it could also be read so: {reading.why} ({_keys(reading)})" for reading in others]
    skipped = [reading for reading in possible if reading.chat and reading not in fit and reading.use == model.use]
    notes += [f"not taken: {reading.why}, but {model.path} has no chat_template" for reading in skipped]
    elsewhere = [reading for reading in possible if reading.use != model.use]
    notes += [f"with {_WANTED[reading.use]} instead: {reading.task}, for {reading.why}" for reading in elsewhere]
    return taken, notes


def _fits(reading: Reading, model: ModelFacts) -> bool:
    if reading.chat:
        return model.chat
    if reading.task in ("classification", "regression"):
        return (reading.task == "regression") == model.regression
    return True


def _keys(reading: Reading) -> str:
    return ", ".join(f"{key}: {name}" for key, name in reading.keys.items())


def _reference(model: ModelFacts, path: str | None) -> ModelFacts | None:
    """What the reference is. EngineError if it cannot score the same samples."""
    if path is None:
        return None
    other = model_facts(path)
    if other.use != model.use:
        raise EngineError(f"{path}: is {other.name}, but {model.path} is {model.name}; both must do the same task")
    return other


def _check_labels(reading: Reading, model: ModelFacts, columns: Columns) -> None:
    """EngineError if the labels are not the model's, or are texts and nobody says which class each is."""
    name = reading.keys.get("label_column") or reading.keys.get("tags_column")
    if name is None:
        return
    facts, names = columns.facts[name], model.labels
    own, texts = facts.classes, facts.type in ("string", "list<string>")
    ordered = own is not None and (facts.in_order or not texts)  # a dictionary of texts is in the order of its rows
    if own is not None and ordered and model.outputs not in (None, len(own)):
        raise EngineError(f"{model.path}: has {model.outputs} outputs, and {name} has {len(own)} classes")
    if own is not None and names is not None and set(own) - set(names):
        raise EngineError(f"{model.path}: its classes are {_few(names)}, and those of {name} are {_few(own)}")
    if texts and not ordered and names is None:
        raise EngineError(
            f"{model.path}: does not name its classes (id2label), and {name} holds texts: nothing says which is which; "
            "write them into its config.json, or take the column's numbers"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(name[:40] for name in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _check_target(path: str, reading: Reading) -> None:
    shard, columns = _first_columns(find_shards(path))
    missing = [name for name in reading.keys.values() if name not in columns.facts]
    if missing:
        raise CorpusError(
            f"{path}: {shard.path} has no column {missing[0]!r}, only {columns.described()}; a target has the "
            "columns of the corpus"
        )


def _id_column(shard: Shard, columns: Columns) -> str | None:
    """The column of ids, if the first rows differ in it."""
    if columns.id is None:
        return None
    for chunk in read(shard, (columns.id,)):
        values = chunk.columns[columns.id]
        return columns.id if None not in values and len(set(map(str, values))) == len(values) else None
    return None
