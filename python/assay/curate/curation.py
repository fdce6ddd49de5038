"""Selecting over a whole scores folder, and writing the curated corpus."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from assay._json import dumps
from assay._version import __version__
from assay.corpus.claim import CLAIM, claim
from assay.corpus.copying import copy_sidecars
from assay.corpus.errors import CorpusError, ShardError
from assay.corpus.layout import MANIFEST, selection_path, table_path
from assay.corpus.listing import summarise_left_out
from assay.corpus.named_files import files_then, shards_with_files
from assay.corpus.score_files import score_field
from assay.corpus.scores_folder import Scored, Scores, State, open_scores, refuse_corpora, refuse_scores
from assay.corpus.shards import Shard
from assay.corpus.storage import Store, is_temporary, may_pass
from assay.curate.auditing import Audit, Rule
from assay.curate.chosen import ShardSelection, write_fates
from assay.curate.condition import Condition
from assay.curate.forms import Form, check_named_files, check_repeats, find_form, is_repeat
from assay.curate.grouping import dictionary, group_table, read_groups
from assay.curate.manifests import is_selection
from assay.curate.mixes import Mix
from assay.curate.ranking import score_name
from assay.curate.rows import KEPT, Beside, Rows, open_beside, read_batches
from assay.curate.rules import group_column
from assay.curate.where import Answer, ask, parse_condition
from assay.curate.whole import RowCheck, scored_shards
from assay.select import Cut, GroupCuts, Selection
from assay.select.groups import Groups

log = logging.getLogger("assay")

SELECTION = "a selection"
GROUPS = "_groups.parquet"


@dataclass(frozen=True)
class ShardCounts:
    """What became of one shard's rows."""

    path: str
    table: str
    table_sha256: str
    rows: int
    kept: int
    dropped: int
    quarantined: int
    copies: int | None = None
    """Its rows in the output, where some may be there more than once."""
    written: str | None = None
    """The file that holds its kept rows' indices or weights."""
    written_sha256: str | None = None


@dataclass(frozen=True)
class Curated:
    """What a selection kept of a corpus."""

    selection: Selection
    shards: tuple[ShardCounts, ...]
    unreadable: dict[str, str]
    left_out: dict[str, str]
    where: Answer | None = None
    """What the condition says of each scored row, if one was given."""
    groups: Groups | None = None
    """Of the scored rows, where the rule looks at groups."""
    cut: Cut | GroupCuts | None = None
    """Where the rule is an audit; of one in groups, their cuts."""

    @property
    def missing(self) -> str:
        """What of the corpus no rule could have kept, in one line; empty if nothing."""
        parts = [f"{len(self.unreadable)} unreadable shards are not in it"] if self.unreadable else []
        parts += [summarise_left_out(self.left_out)] if self.left_out else []
        parts += ["no row has scores: all are in quarantine"] if self.rows and self.rows == self.quarantined else []
        return "; ".join(parts)

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def kept(self) -> int:
        return sum(shard.kept for shard in self.shards)

    @property
    def copies(self) -> int | None:
        """Rows in the output, where some may be there more than once."""
        return sum(shard.copies or 0 for shard in self.shards) if self.selection.copies is not None else None

    @property
    def quarantined(self) -> int:
        return sum(shard.quarantined for shard in self.shards)


def curate(
    scores_url: str,
    by: str | None,
    rule: Rule | Audit,
    output_url: str,
    corpus_path: str | None = None,
    form: str = "shards",
    where: str | None = None,
    beside: Mapping[str, str] | None = None,
    group: str | None = None,
    mix: Mix | None = None,
) -> Curated:
    """Choose rows by one score over all shards and write them under ``output_url``, in their own format.

    ``rule`` gets a table with the one score, all shards after one another, and returns a `Selection`. Beside
    the shards go a manifest and, per shard, a table of every input row with its score, fate and reason. Instead of
    the shards, other ``form``s write per shard the kept rows' ``"indices"`` or their ids and ``"weights"``, or
    ``"datasets"``: the shards in a folder that ``datasets.load_dataset`` takes.
    Of ``where``, a condition on scores such as ``"mimic > 0 and loss < quantile(loss, 0.9)"``, ``rule`` gets the rows
    that pass; the others are dropped. Without ``by`` the tables then show the first score that it names. In it
    ``NAME.score`` is one of another run over the same shards, whose folder ``beside`` has under that name; a row that
    the other run has not scored has NaN there. ``NAME.kept`` says whether a selection of these scores kept a row.
    With ``group``, a column of the corpus or ``shard``, the table has a column `group_column` of each row's group, for
    rules that choose within groups; ``mix`` is what the rule mixes by, for the manifest.
    Scores that do not cover the corpus as it is now are an CorpusError, before anything is written.
    """
    scores = open_scores(scores_url, corpus_path)
    tables = scored_shards(scores)
    rows = Rows(scores.store, tables, open_beside(scores, tables, beside or {}))
    condition = None if where is None else parse_condition(where, rows.names())
    _refuse_unused(rows.beside, condition)
    name = score_name(scores, by or _first_score(scores, condition, rows))
    output, written = Store.at(output_url), find_form(form)
    _refuse_inputs(output, scores, [shard for shard, _ in tables], written, rows.beside)
    answer = None if condition is None else ask(rows, condition)
    groups = None if group is None else read_groups(scores.store, tables, group)
    table = _read_table(scores.store, tables, name)
    cut = None
    if isinstance(rule, Audit):
        passes = None if answer is None else answer.passes
        audit, (cut, rule) = rule, rule.bind(scores.store, tables, table, passes, groups)
    selection, shards = _select(scores, tables, table, rule, answer, groups, group_column(group or "", by or ""))
    own = [chosen.shard for chosen in shards]
    written.check(selection, own)
    check_repeats(selection, own, written, bool(scores.corpus.sidecars))
    check_named_files(shards, written)
    with claim(output, SELECTION):
        for path in output.sweep():
            log.info("removed %s, left by a selection that was killed", path)
        output.remove(MANIFEST)  # it comes back when everything that it speaks of is there
        _remove_stale(output, written, own, scores.store)
        counts = tuple(_write_shard(scores.store, chosen, name, output, written) for chosen in shards)
        if written.has_sidecars:
            copy_sidecars(scores.corpus, output, selection.rule)
        for path, text in written.texts.items():
            output.write_text(path, text)
        unreadable = {status.shard.path: status.detail for status in scores.of(State.UNREADABLE)}
        left_out = {entry.path: entry.reason for entry in scores.corpus.left_out}
        curated = Curated(selection, counts, unreadable, left_out, answer, groups, cut)
        manifest = _manifest(scores, name, form, curated, rows)
        if groups is not None:
            manifest["group"] = {"column": group, "groups": len(groups), **_write_groups(groups, selection, output)}
        if cut is not None:
            manifest["audit"] = audit.to_json(cut)
        if mix is not None:
            manifest["mix"] = mix.to_json()
        output.write_text(MANIFEST, dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return curated


def _write_groups(groups: Groups, selection: Selection, output: Store) -> dict[str, str]:
    with output.write(GROUPS) as file:
        pq.write_table(
            group_table(groups, selection.mask, selection.limits, selection.copies), file, compression="zstd"
        )
    return {"written": GROUPS, "written_sha256": output.sha256(GROUPS)}


def _remove_stale(output: Store, form: Form, shards: Sequence[Shard], scores: Store) -> None:
    """What an earlier selection has written there and this one may not."""
    output.remove(GROUPS)
    ours = {path for shard in shards for path in form.files(shard)}
    others = [path for path in output.files() if path not in ours and path.startswith(form.prefix)]
    repeats = {path for path in others if is_repeat(path[len(form.prefix) :])}
    for path in sorted(repeats | _named_among(others, form, shards, scores)):
        output.remove(path)


def _named_among(paths: Collection[str], form: Form, shards: Sequence[Shard], scores: Store) -> set[str]:
    """Those of the paths at which a form has files that the shards' rows name."""
    if not paths or not form.has_named_files:
        return set()
    bare = {path: path.partition("/")[2] if is_repeat(path) else path for path in paths}
    files = {
        file for shard in shards_with_files(scores, shards) for file in files_then(scores, shard) & {*bare.values()}
    }
    return {path for path, file in bare.items() if file in files}


def _refuse_unused(beside: Mapping[str, Beside], condition: Condition | None) -> None:
    named = [] if condition is None else list(condition.columns.values())
    for name in beside:
        if not any(column.startswith(f"{name}.") for column in named):
            raise CorpusError(f"--with {name}: has no effect, for --where names no {name}.score nor {name}.{KEPT}")


def _first_score(scores: Scores, condition: Condition | None, rows: Rows) -> str | None:
    """Of one number per row: the first that a condition names, or the first of all."""
    if condition is None:
        return None
    kinds = rows.names()
    named = [name for name in (*condition.columns.values(), *scores.columns) if name in scores.columns]
    return next((name for name in named if kinds[name] == pa.float32()), None)


def _select(
    scores: Scores,
    tables: Sequence[tuple[Shard, Scored]],
    table: pa.Table,
    rule: Rule,
    answer: Answer | None,
    groups: Groups | None,
    column: str,
) -> tuple[Selection, list[ShardSelection]]:
    """What the rule makes of all scores together, and of each shard's. ``column``: what that of the groups is named."""
    (name,), values = table.column_names, table.column(0).chunk(0).to_numpy()
    if groups is not None:
        table = table.drop_columns([name]) if name == column else table  # of a rule that looks at no score
        table = table.append_column(column, dictionary(groups))
    selection = rule(table) if answer is None else answer.choose(table, rule)
    if len(selection.mask) and not selection.mask.any():
        raise CorpusError(f"{selection.summary()}: no row is kept, and nothing was written")
    scale, firsts, image_columns = _scale(selection), _firsts(scores), _image_columns(scores, [s for s, _ in tables])
    shards, start = [], 0
    for shard, scored in tables:
        part = slice(start, start := start + scored.scored)
        own = (values[part], selection, part, scale, firsts[shard.path], groups, image_columns.get(shard))
        shards.append(ShardSelection(scores.store, shard, scored, *own))
    return selection, shards


def _image_columns(scores: Scores, shards: Sequence[Shard]) -> dict[Shard, str]:
    """By shard the column in which its rows name files, of those that do; empty if the recipe does not say."""
    task = scores.identity.recipe.get("task")
    column = task.get("image_column") if isinstance(task, dict) else None
    return dict.fromkeys(shards_with_files(scores.store, shards), column if isinstance(column, str) else "")


def _scale(selection: Selection) -> float:
    """What makes the weights' mean 1 over the kept rows."""
    kept = 0.0 if selection.weights is None else float(selection.weights[selection.mask].sum())
    return int(selection.mask.sum()) / kept if kept > 0 else 1.0


def _firsts(scores: Scores) -> dict[str, int | None]:
    """By shard, how many rows lie in those before it; None from the first that nobody could read on."""
    firsts: dict[str, int | None] = {}
    start: int | None = 0
    for status in scores.shards:
        firsts[status.shard.path] = start
        start = None if start is None or status.table is None else start + status.table.rows
    return firsts


def _refuse_inputs(
    output: Store, scores: Scores, shards: Sequence[Shard], form: Form, beside: Mapping[str, Beside]
) -> None:
    """CorpusError if what is written would fall on a corpus, scores or somebody's files."""
    ours = {path for shard in shards for path in (*form.files(shard), selection_path(shard))}
    refuse_corpora(output, scores, sorted(ours), [path for other in beside.values() for path in other.corpora])
    used = [scores.store, *(other.store for other in beside.values())]
    refuse_scores(output, *used)
    if held := next((store for store in used if output.holds(store)), None):
        raise CorpusError(f"{output.url}: the output and {held.url} must not lie in each other")
    if GROUPS in ours:
        raise CorpusError(f"{GROUPS}: a shard of the corpus has the name of the table of groups; rename it")
    output.refuse_detours(ours)
    # A folder with other files would become a mixture of two corpora; and files of these names may be another corpus.
    ours |= {MANIFEST, CLAIM, GROUPS, *form.texts, *(scores.corpus.sidecars if form.has_sidecars else ())}
    there = [path for path in output.files() if not is_temporary(path)]
    if "" in there:
        raise CorpusError(f"{output.url}: is a file; choose an empty folder")
    ours |= {path for path in there if path.startswith(form.prefix) and _repeats(path[len(form.prefix) :], ours, form)}
    strangers = [path for path in there if path not in ours and not any(_is_own(shard, path, form) for shard in shards)]
    strangers = sorted(set(strangers) - _named_among(strangers, form, shards, scores.store))
    if strangers:
        raise CorpusError(
            f"{output.url}: holds {len(strangers)} files that this selection would not write "
            f"({strangers[0]}); choose an empty folder"
        )
    if there and not _is_selection(output):
        raise CorpusError(f"{output.url}: holds {there[0]}, which no selection wrote; choose an empty folder")


def _repeats(path: str, ours: Collection[str], form: Form) -> bool:
    """Whether it is one of our files in a folder for rows that are there more than once."""
    return is_repeat(path) and f"{form.prefix}{path.partition('/')[2]}" in ours


def _is_own(shard: Shard, path: str, form: Form) -> bool:
    """Whether a file lies in a shard that is a folder, under a name of those that its format makes up."""
    pattern, folder = shard.format.own_files, f"{form.prefix}{shard.path}/"
    return pattern is not None and path.startswith(folder) and pattern.fullmatch(path[len(folder) :]) is not None


def _is_selection(output: Store) -> bool:
    """Whether what is there was written by a selection, be it one that was killed."""
    try:
        if output.exists(CLAIM):
            return output.read_text(CLAIM) == SELECTION
    except (OSError, ValueError) as error:
        if may_pass(error):
            raise
        return False
    return is_selection(output)


def _read_table(store: Store, tables: Sequence[tuple[Shard, Scored]], name: str) -> pa.Table:
    """One score of every scored row, as a table of one column that says which end of it to keep."""
    field = score_field(store, table_path(tables[0][0]), name)
    if field.type != pa.float32():
        raise CorpusError(f"--by {name}: holds {field.type} per row; expected one number to judge by")
    values = pa.array(_read(store, tables, name), from_pandas=False)
    return pa.Table.from_arrays([values], schema=pa.schema([field]))


def _read(store: Store, tables: Sequence[tuple[Shard, Scored]], name: str) -> npt.NDArray[np.float32]:
    """One score of every scored row, shards after one another. Nothing else of the tables is held."""
    values, start = np.empty(sum(table.scored for _, table in tables), np.float32), 0
    for shard, table in tables:
        check, end = RowCheck(store, shard, table), start + table.scored
        for batch in read_batches(store, table_path(shard), ["row", name]):
            check.see(batch.column("row").to_numpy())
            if start + batch.num_rows > end:
                break
            values[start : start + batch.num_rows] = batch.column(name).to_numpy(zero_copy_only=False)
            start += batch.num_rows
        check.end()
        if start != end:
            raise CorpusError(f"{store.full(table_path(shard))}: has other rows than its footer says; score it again")
    return values


def _write_shard(store: Store, chosen: ShardSelection, name: str, output: Store, form: Form) -> ShardCounts:
    shard, counts = chosen.shard, chosen.table
    try:
        written = form.write(store, chosen, output)
        if chosen.table.input != shard.fingerprint():
            raise ShardError("has changed meanwhile")
    except ShardError as error:
        raise CorpusError(f"{shard.path}: cannot be copied: {error}") from error
    write_fates(store, chosen, name, output)
    kept = int(chosen.kept.sum())
    digest = store.sha256(table_path(shard))
    dropped, hashed = counts.scored - kept, None if written is None else output.sha256(written)
    copies = None if chosen.copies is None else int(chosen.copies.sum(dtype=np.int64))
    return ShardCounts(
        shard.path, table_path(shard), digest, chosen.total, kept, dropped, counts.quarantined, copies, written, hashed
    )


def _manifest(scores: Scores, name: str, form: str, curated: Curated, rows: Rows) -> dict[str, Any]:
    selection = curated.selection
    return {
        "format": 1,
        "version": __version__,
        "rule": selection.rule,
        "by": name,
        **({} if curated.where is None else {"where": curated.where.to_json()}),
        "output": form,
        "threshold": selection.threshold,
        "facts": dict(selection.facts),
        "scores": scores.store.url,
        "corpus": scores.corpus.store.url,
        **({"with": {n: other.to_json(rows.tables) for n, other in rows.beside.items()}} if rows.beside else {}),
        "recipe": scores.identity.recipe,
        "models": scores.identity.models,
        "rows": {"in": curated.rows, "kept": curated.kept, "quarantined": curated.quarantined}
        | ({} if curated.copies is None else {"written": curated.copies}),
        "unreadable": curated.unreadable,
        "left_out": curated.left_out,
        "shards": [_counts(shard) for shard in curated.shards],
    }


def _counts(shard: ShardCounts) -> dict[str, Any]:
    return {key: value for key, value in vars(shard).items() if value is not None}
