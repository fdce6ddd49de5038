"""What a condition says of every scored row: DuckDB reads them as a stream, and holds none of them."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay._lazy import require
from assay.corpus.errors import CorpusError
from assay.corpus.score_files import ROW_GROUP_ROWS
from assay.curate.auditing import Rule
from assay.curate.condition import Aggregate, Compared, Condition, ExpressionError, Kind, Rank, decisive, sound
from assay.curate.expressions import compile_condition
from assay.curate.rows import TEXTS, Rows
from assay.select import Selection

# No file, no network, no extension; and sums add up in one order on every machine.
_SETTINGS = {
    "enable_external_access": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "threads": 1,
    "memory_limit": "4GB",
}
_LONGEST = 10_000
_MOST_SCORES = 200
_BEFORE, _AFTER = "SELECT (", "\n)"
_NOT, _PASSES, _UNKNOWN, _NAN = 0, 1, 2, 3


@dataclass(frozen=True)
class Answer:
    """What a condition says of every scored row, shards after one another.

    Attributes:
        codes: (N,), of each row 0: it is not so; 1: it is; 2: a number in it has no value; 3 + i: the i-th of the
            scores that it needs is NaN.
        facts: by their text, the numbers of the whole table that it speaks of.
    """

    condition: Condition
    codes: npt.NDArray[np.uint8]
    facts: Mapping[str, float]

    @property
    def needs(self) -> list[str]:
        """The scores that a row must have."""
        return [self.condition.columns[column] for column in self.condition.needs]

    @property
    def passes(self) -> npt.NDArray[np.bool_]:
        """(N,), the rows of which the condition is so."""
        passes: npt.NDArray[np.bool_] = self.codes == _PASSES
        return passes

    def to_json(self) -> dict[str, Any]:
        """The condition, and how many rows pass it."""
        return {"condition": self.condition.text, **self.counts()}

    def counts(self) -> dict[str, Any]:
        """How many rows pass, how many do not, and why."""
        # Not by bincount, which makes eight bytes of each code.
        found = [int(np.count_nonzero(self.codes == code)) for code in range(_NAN + len(self.needs))]
        nan = {name: count for name, count in zip(self.needs, found[_NAN:], strict=True) if count}
        return {"passed": found[_PASSES], "failed": found[_NOT], "unknown": found[_UNKNOWN], "nan": nan}

    def choose(self, table: pa.Table, rule: Rule) -> Selection:
        """What ``rule`` makes of the rows that pass; the others are dropped, with the reason.

        CorpusError if none passes.
        """
        passes, text = self.passes, self.condition.line
        if not passes.any():
            raise CorpusError(f"--where {text}: no row passes; {self.summary()}")
        chosen = rule(table.filter(pa.array(passes)))
        legend = [*chosen.legend, *[""] * (3 - len(chosen.legend))]  # of a rule's codes the third stands for NaN
        codes = self.codes + np.uint8(len(legend))
        codes[passes] = chosen.codes
        legend += [f"dropped: not: {text}", "", f"dropped: has no value: {text}"]
        legend += [f"dropped: {name} is NaN" for name in self.needs]
        mask = np.zeros(len(codes), bool)
        mask[passes] = chosen.mask
        weights, copies = None, None
        if chosen.weights is not None:
            weights = np.zeros(len(codes))
            weights[passes] = chosen.weights
        if chosen.copies is not None:
            copies = np.zeros(len(codes), np.uint8)
            copies[passes] = chosen.copies
        facts = {**chosen.facts, **self.facts}
        return replace(
            chosen,
            rule=f"{chosen.rule}, where {text}",
            mask=mask,
            codes=codes,
            legend=tuple(legend),
            weights=weights,
            facts=facts,
            copies=copies,
        )

    def summary(self) -> str:
        """One line: how many rows pass of how many, and what keeps others from being judged."""
        counts = self.counts()
        line = f"{counts['passed']:,} of {len(self.codes):,} rows pass"
        line += "".join(f", {count:,} have no {name} (NaN)" for name, count in counts["nan"].items())
        return line + (f", {counts['unknown']:,} have no value" if counts["unknown"] else "")


def parse_condition(text: str, columns: Mapping[str, pa.DataType]) -> Condition:
    """Read a condition on columns of `Rows`.

    Raises:
        ExpressionError: it is no condition, or asks for what is not there.
        ImportError: DuckDB is missing.
    """
    if not text.strip():
        raise ExpressionError("is empty; expected a condition on scores")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ExpressionError("is no UTF-8", text)
    if len(text) > _LONGEST:
        raise ExpressionError(f"has {len(text):,} characters; expected at most {_LONGEST:,}")
    kinds: dict[str, Kind] = {name: "number" for name, kind in columns.items() if kind == pa.float32()}
    kinds |= {name: "condition" for name, kind in columns.items() if kind == pa.bool_()}
    kinds |= {"row": "number", **dict.fromkeys(TEXTS, "text")}
    before = len(_BEFORE.encode())

    def location(found: int) -> int:
        return len(text.encode()[: max(found - before, 0)].decode(errors="ignore"))

    try:
        condition = compile_condition(text, _parse(text), kinds, location)
    except RecursionError as error:
        raise ExpressionError("is nested too deep", text) from error
    if len(condition.columns) > _MOST_SCORES:
        raise ExpressionError(f"names {len(condition.columns)} scores; expected at most {_MOST_SCORES}")
    return condition


def _parse(text: str) -> dict[str, Any]:
    """DuckDB's tree of the one expression that ``text`` must be."""
    with _connection() as connection:
        reply = _serialized(connection, text)
        model = _serialized(connection, "1")["statements"]
    if reply["error"]:
        place = int(reply.get("position") or 0) - len(_BEFORE)
        said = str(reply.get("error_message")).split("\n")[0]
        said = "is nested too deep" if "expression depth" in said else said[:200]
        raise ExpressionError(said, text, min(max(place, 0), len(text)))
    statements = reply["statements"]
    chosen = [statement["node"].get("select_list", []) for statement in statements]
    if [len(listed) for listed in chosen] != [1]:
        raise ExpressionError("expected one expression", text)
    tree: dict[str, Any] = chosen[0][0]
    # All but the expression must be as in a statement that has nothing else.
    model[0]["node"]["select_list"] = statements[0]["node"]["select_list"] = []
    if statements != model:
        raise ExpressionError("expected one expression, and nothing else of SQL", text)
    return tree


def _serialized(connection: Any, text: str) -> dict[str, Any]:
    found = connection.execute("SELECT json_serialize_sql(?)", [f"{_BEFORE}{text}{_AFTER}"]).fetchone()
    reply: dict[str, Any] = json.loads(found[0])
    return reply


def ask(rows: Rows, condition: Condition) -> Answer:
    """Judge every row of the score tables.

    Raises:
        CorpusError: an aggregate has no value; a table is not what its footer says; or memory does not suffice.
    """
    codes = np.full(len(rows), 255, np.uint8)
    with _connection() as connection:
        values = _values(connection, rows, condition)
        for places, found in _verdicts(connection, rows, condition, values):
            codes[places] = found
    if (codes == 255).any():
        raise CorpusError(f"{rows.store.url}: the score tables have fewer rows than their footers say; score again")
    return Answer(condition, codes, _facts(condition, values))


def _verdicts(
    connection: Any, rows: Rows, condition: Condition, values: Mapping[str, float]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]]:
    """Rows' places and codes, some at a time, in any order."""
    source, parameters, beside = _source(connection, rows, condition, values)
    nan = [f"WHEN isnan({column}) THEN {_NAN + i}" for i, column in enumerate(condition.needs)]
    verdict = f"CASE {' '.join(nan)} WHEN {condition.sql} THEN {_PASSES} WHEN NOT {condition.sql} THEN {_NOT}"
    query = f"SELECT place, ({verdict} ELSE {_UNKNOWN} END)::UTINYINT AS code FROM {source}"
    for batch in _run(connection, rows, condition, query, parameters, beside):
        yield batch.column("place").to_numpy(), batch.column("code").to_numpy()


def trace(rows: Rows, condition: Condition, places: Sequence[int]) -> dict[int, tuple[Compared, ...]]:
    """What each of the condition's comparisons says of some rows, by their places among all. As `ask` it reads all
    rows."""
    parts = list(enumerate(condition.comparisons))
    terms = [f"CASE WHEN {_lacking(one.needs)} THEN NULL ELSE {one.sql} END AS h{i}" for i, one in parts]
    terms += [f"({sql})::DOUBLE AS {end}{i}" for i, one in parts for end, sql in zip("lr", one.sides, strict=False)]
    terms.append(f"({_lacking(condition.needs)}) AS lacks")
    found = {}
    with _connection() as connection:
        values = _values(connection, rows, condition)
        source, parameters, beside = _source(connection, rows, condition, values)
        wanted = ", ".join(str(int(place)) for place in places)
        query = f"SELECT place, {', '.join(terms)} FROM {source} WHERE place IN ({wanted})"
        for batch in _run(connection, rows, condition, query, parameters, beside):
            for row in batch.to_pylist():
                found[row["place"]] = _compared(condition, row)
    return found


def _facts(condition: Condition, values: Mapping[str, float]) -> dict[str, float]:
    return {a.text: values[a.name] for a in condition.aggregates if not a.by_shard}


def _compared(condition: Condition, row: Mapping[str, Any]) -> tuple[Compared, ...]:
    holds = [row[f"h{i}"] for i in range(len(condition.comparisons))]
    # A row that lacks a score is dropped whatever else is so.
    decides = [False] * len(holds) if row["lacks"] else decisive(condition.logic, holds)
    sides = {name: None if value is None or math.isnan(value) else value for name, value in row.items()}
    return tuple(
        Compared(one.text, holds[i], sides.get(f"l{i}"), sides.get(f"r{i}"), decides[i])
        for i, one in enumerate(condition.comparisons)
    )


def _source(
    connection: Any, rows: Rows, condition: Condition, values: Mapping[str, float]
) -> tuple[str, dict[str, Any], dict[str, pa.Table]]:
    """SQL of the rows with all that the condition takes of others, its parameters, and the tables that it names."""
    parameters: dict[str, Any] = {**condition.parameters, **values}
    source, beside = "scored", {}
    if by_shard := [aggregate for aggregate in condition.aggregates if aggregate.by_shard]:
        beside["shards"] = _by_shard(connection, rows, condition, by_shard)
        source = f"(scored LEFT JOIN shards ON {condition.shard} = part)"
    if condition.ranks:
        for rank in condition.ranks:
            parameters |= rank.argument.parameters
        source = f"(SELECT *, {', '.join(_ranked(rank, condition) for rank in condition.ranks)} FROM {source})"
    return source, parameters, beside


def _ranked(rank: Rank, condition: Condition) -> str:
    """A rank's column. Rows without a number are ranked by themselves, and have none."""
    value = sound(rank.argument)
    parts = [f"({_lacking(rank.argument.needs)})", f"{value} IS NULL", *([condition.shard] if rank.by_shard else [])]
    place = f"{rank.function}() OVER (PARTITION BY {', '.join(parts)} ORDER BY {value})"
    return f"CASE WHEN {value} IS NULL THEN NULL ELSE {place} END AS {rank.name}"


def _values(connection: Any, rows: Rows, condition: Condition) -> dict[str, float]:
    """By its name, the value of each aggregate of the whole table."""
    whole = [aggregate for aggregate in condition.aggregates if not aggregate.by_shard]
    quantiles = [aggregate for aggregate in whole if aggregate.share is not None]
    terms = {a.name: f"{a.function}({sound(a.argument)}){_only(a)}" for a in whole if a.share is None}
    terms |= {a.name: f"count({sound(a.argument)}){_only(a)}" for a in quantiles}
    found = _one_row(connection, rows, condition, terms, whole)
    shares = {}
    for aggregate in quantiles:
        # The order statistic that `select.quantile` takes, as a share by which DuckDB finds it.
        count = max(found[aggregate.name], 1)
        share = (math.floor((aggregate.share or 0.0) * (count - 1)) + 0.5) / count
        shares[aggregate.name] = f"quantile_disc({sound(aggregate.argument)}, {share!r}){_only(aggregate)}"
    found |= _one_row(connection, rows, condition, shares, quantiles)
    for aggregate in whole:
        value = found[aggregate.name]
        if value is None or math.isnan(value):
            raise ExpressionError(f"{aggregate.text} has no value over these scores", condition.text, aggregate.place)
    return {name: float(value) for name, value in found.items()}


def _one_row(
    connection: Any, rows: Rows, condition: Condition, terms: Mapping[str, str], of: Sequence[Aggregate]
) -> dict[str, Any]:
    if not terms:
        return {}
    query = f"SELECT {', '.join(f'{term} AS {name}' for name, term in terms.items())} FROM scored"
    found = pa.Table.from_batches(list(_run(connection, rows, condition, query, _parameters(of))))
    return dict(found.to_pylist()[0])


def _by_shard(connection: Any, rows: Rows, condition: Condition, of: Sequence[Aggregate]) -> pa.Table:
    """The aggregates of each shard, under their names, beside its path, ``part``; null where one has no value."""
    terms = []
    for aggregate in of:
        value = sound(aggregate.argument)
        term = f"{aggregate.function}({value}){_only(aggregate)}"
        if aggregate.share is not None:  # each shard has a number of rows of its own, and DuckDB takes one share
            held, only = f"{value} IS NOT NULL", _only(aggregate)[:-1]
            # The share as Python has it: a decimal, which SQL makes of it, has another product with some counts.
            place = f"floor({aggregate.share!r}::DOUBLE * (count(*){only} AND {held}) - 1))::BIGINT + 1"
            term = f"list_sort(list({value}){only} AND {held}))[{place}]"
        terms.append(f"{term}::DOUBLE AS {aggregate.name}")
    grouped = f"SELECT {condition.shard} AS part, {', '.join(terms)} FROM scored GROUP BY part"
    named = [f"CASE WHEN isnan({a.name}) THEN NULL ELSE {a.name} END AS {a.name}" for a in of]
    query = f"SELECT part, {', '.join(named)} FROM ({grouped})"
    return pa.Table.from_batches(list(_run(connection, rows, condition, query, _parameters(of))))


def _parameters(aggregates: Iterable[Aggregate]) -> dict[str, Any]:
    return {name: value for a in aggregates for name, value in a.argument.parameters.items()}


def _only(aggregate: Aggregate) -> str:
    return f" FILTER (WHERE NOT ({_lacking(aggregate.argument.needs)}))"


def _lacking(columns: Iterable[str]) -> str:
    return " OR ".join(f"isnan({column})" for column in sorted(columns)) or "FALSE"


def _run(
    connection: Any,
    rows: Rows,
    condition: Condition,
    query: str,
    parameters: Mapping[str, Any],
    beside: Mapping[str, pa.Table] | None = None,
) -> Iterator[pa.RecordBatch]:
    """A query over ``scored``, the tables' rows after one another: ``place`` and the condition's columns; and over
    ``beside``, tables by their names."""
    duckdb = require("duckdb", "sql")
    failed: list[BaseException] = []
    schema, stream = rows.stream(condition.columns)

    def batches() -> Iterator[pa.RecordBatch]:
        try:
            yield from stream
        except BaseException as error:  # DuckDB would make a text of it, of an interrupt too
            failed.append(error)
            raise

    own = connection.cursor()
    for name, table in (beside or {}).items():
        own.register(name, table)
    own.register("scored", pa.RecordBatchReader.from_batches(schema, batches()))
    try:
        yield from own.sql(query, params=dict(parameters)).to_arrow_reader(ROW_GROUP_ROWS)
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        if failed:
            raise failed[0] from error
        raise CorpusError(f"--where {condition.line}: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        if "interrupted" in str(error):  # what DuckDB makes of Ctrl-C
            raise KeyboardInterrupt from error
        raise
    finally:
        own.close()


@contextmanager
def _connection() -> Iterator[Any]:
    """An empty database in memory, which spills into a folder of its own where its limit does not suffice."""
    duckdb = require("duckdb", "sql")
    with (
        tempfile.TemporaryDirectory(prefix="assay-") as spill,
        duckdb.connect(":memory:", config={**_SETTINGS, "temp_directory": spill}) as connection,
    ):
        connection.execute("SET lock_configuration = true")
        yield connection
