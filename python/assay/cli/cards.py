"""What `assay show` prints: a card per sample, with its place, its scores and its columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from assay.cli.values import as_json, columns_lines, cut, token_lines
from assay.corpus.errors import BadRow, CorpusError, ShardError
from assay.corpus.layout import MANIFEST, RESOLVED_RECIPE
from assay.corpus.readers import columns_of
from assay.corpus.scores_folder import Scores
from assay.corpus.shards import Shard
from assay.curate import Ranked, Ranking, read_samples
from assay.engine import open_encoder
from assay.recipe import load_recipe
from assay.recipe.tasks import TASKS, Encoder, ShowsTokens, TaskSpec

_INDENT = "    "
_TASK: TypeAdapter[TaskSpec] = TypeAdapter(Annotated[TaskSpec, BeforeValidator(TASKS.parse)])


@dataclass(frozen=True)
class Card:
    """One sample as it is shown."""

    end: str
    """worst, best or nan."""
    place: int
    by: str
    ranked: Ranked
    values: Mapping[str, Any]
    classes: Mapping[str, Sequence[str]]
    tokens: Sequence[tuple[str, bool]] | None = None
    fault: str = ""

    @property
    def where(self) -> str:
        return f"{self.ranked.shard.path}:{self.ranked.row}"

    def lines(self, width: int) -> Iterator[str]:
        """The card, none of its lines wider than ``width`` cells."""
        name = self.where if self.ranked.id == self.where else f"{self.ranked.id}  ({self.where})"
        yield cut(f"{self.place:>2}. {self.by} {self.ranked.scores[self.by]:.6g}  {name}", width)
        others = "  ".join(f"{name} {value:.4g}" for name, value in self.ranked.scores.items() if name != self.by)
        notes = [others] if others else []
        notes += [f"not shown: {self.fault}"] if self.fault else []
        yield from (_INDENT + cut(note, width - len(_INDENT)) for note in notes)
        below = [*columns_lines(self.values, width - len(_INDENT), self.classes)]
        if self.tokens is not None:
            below += token_lines(self.tokens, width - len(_INDENT))
        yield from (_INDENT + line for line in below)

    def as_json(self) -> dict[str, Any]:
        """The card in full, as plain JSON."""
        ranked = self.ranked
        shown = {"end": self.end, "place": self.place, "id": ranked.id, "shard": ranked.shard.path, "row": ranked.row}
        shown |= {"scores": as_json(ranked.scores), "sample": as_json(self.values)}
        shown |= {} if self.tokens is None else {"tokens": [[token, counts] for token, counts in self.tokens]}
        return shown | ({"fault": self.fault} if self.fault else {})


def ranking_lines(ranking: Ranking, cards: Sequence[Card], width: int) -> Iterator[str]:
    """All cards, under a line for each end."""
    yield cut(f"{ranking.by}: {ranking.description}" if ranking.description else ranking.by, width)
    what = {
        "worst": f"worst of {ranking.rows:,} rows ({'lowest' if ranking.keep == 'high' else 'highest'} {ranking.by})",
        "best": f"best of {ranking.rows:,} rows ({'highest' if ranking.keep == 'high' else 'lowest'} {ranking.by})",
        "nan": f"of {ranking.nan:,} rows whose {ranking.by} is NaN",
    }
    for end, words in what.items():
        members = [card for card in cards if card.end == end]
        if members:
            yield ""
            yield cut(f"{len(members)} {words}", width)
        for card in members:
            yield from card.lines(width)
    if ranking.nan and not any(card.end == "nan" for card in cards):
        yield ""
        yield cut(f"{ranking.nan:,} rows have NaN for {ranking.by} (--nan 5 shows some)", width)


def make_cards(scores: Scores, ranking: Ranking, tokens: bool, trust: Sequence[str] = ()) -> list[Card]:
    """The ranking's samples with their rows of the corpus: the worst, the best, those without a score.

    Raises:
        CorpusError: ``tokens`` are asked for, and the task has none.
    """
    ends = {"worst": ranking.worst, "best": ranking.best, "nan": ranking.without}
    encoder = _token_encoder(scores, trust) if tokens else None
    columns = list(dict.fromkeys([*task_of(scores).column_keys().values(), *(encoder.columns if encoder else ())]))
    samples = read_samples([ranked for end in ends.values() for ranked in end], columns)
    classes = {shard: class_names(shard) for shard in {ranked.shard for end in ends.values() for ranked in end}}
    cards = []
    for end, members in ends.items():
        for place, ranked in enumerate(members, start=1):
            values = samples[ranked.shard.path, ranked.row]
            common = end, place, ranking.by, ranked
            if isinstance(values, str):
                cards.append(Card(*common, {}, {}, fault=values))
                continue
            mask = _tokens(encoder, values) if encoder else None
            fault = str(mask) if isinstance(mask, BadRow) else ""
            cards.append(
                Card(*common, values, classes[ranked.shard], None if isinstance(mask, BadRow) else mask, fault)
            )
    return cards


def task_of(scores: Scores) -> TaskSpec:
    """The recipe's task, which says which columns it reads. CorpusError if it is none."""
    try:
        return _TASK.validate_python(scores.identity.recipe.get("task"))
    except ValidationError as error:
        raise CorpusError(f"{scores.store.full(MANIFEST)}: its task is none of this version of assay") from error


def class_names(shard: Shard) -> dict[str, Sequence[str]]:
    """By column, the names that a shard gives to whole numbers."""
    try:
        facts = columns_of(shard)
    except (ShardError, OSError):
        return {}
    return {name: its.classes for name, its in facts.items() if its.classes is not None}


def _token_encoder(scores: Scores, trust: Sequence[str]) -> Encoder:
    """The encoder of the recipe that lies beside the scores. CorpusError if it has no tokens to show."""
    if not scores.store.is_local:
        raise CorpusError(f"--tokens: {scores.store.url} is not on this machine, where the recipe's models are")
    recipe = load_recipe(scores.store.full(RESOLVED_RECIPE), trust=trust)
    encoder = open_encoder(recipe)
    if not isinstance(encoder, ShowsTokens):
        raise CorpusError(f"--tokens: the samples of a {recipe.task.kind} task have no tokens that count in a loss")
    return encoder


def _tokens(encoder: Encoder, values: Mapping[str, Any]) -> Sequence[tuple[str, bool]] | BadRow:
    (encoded,) = encoder.encode([tuple(values[name] for name in encoder.columns)])
    if isinstance(encoded, BadRow):
        return encoded
    assert isinstance(encoder, ShowsTokens)
    return encoder.tokens(encoded.data)
