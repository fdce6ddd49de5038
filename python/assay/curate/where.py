"""What a condition says of every scored row: DuckDB reads them as a stream, and holds none of them."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay._lazy import require
from assay.corpus.errors import CorpusError
from assay.corpus.score_files import ROW_GROUP_ROWS
from assay.curate.expressions import Aggregate, Condition, ExpressionError, Kind, compile_condition, sound
from assay.curate.rows import TEXTS, Rows
from assay.curate.rules import Rule
from assay.select import Selection

# No file, no network, no extension; and sums add up in one order on every machine.
_SETTINGS = {
    "enable_external_access": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "ieee_floating_point_ops": True,
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

    def to_json(self) -> dict[str, Any]:
        """The condition, and how many rows pass it."""
        return {"condition": self.condition.text, **self.counts()}

    def counts(self) -> dict[str, Any]:
        """How many rows pass, how many do not, and why."""
        found = np.bincount(self.codes, minlength=_NAN + len(self.needs)).tolist()
        nan = {name: count for name, count in zip(self.needs, found[_NAN:], strict=True) if count}
        return {"passed": found[_PASSES], "failed": found[_NOT], "unknown": found[_UNKNOWN], "nan": nan}

    def choose(self, table: pa.Table, rule: Rule) -> Selection:
        """What ``rule`` makes of the rows that pass; the others are dropped, with the reason.

        CorpusError if none passes.
        """
        passes, text = self.codes == _PASSES, self.condition.text
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
        weights = None
        if chosen.weights is not None:
            weights = np.zeros(len(codes))
            weights[passes] = chosen.weights
        facts = {**chosen.facts, **self.facts}
        rule_text = f"{chosen.rule}, where {text}"
        return Selection(rule_text, mask, codes, tuple(legend), chosen.threshold, weights, facts)

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
        said = "is nested too deep" if "expression depth" in said else said
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
        facts = _facts(connection, rows, condition)
        values = dict(zip((a.name for a in condition.aggregates), facts.values(), strict=True))
        for places, found in _verdicts(connection, rows, condition, values):
            codes[places] = found
    if (codes == 255).any():
        raise CorpusError(f"{rows.store.url}: the score tables have fewer rows than their footers say; score again")
    return Answer(condition, codes, facts)


def _verdicts(
    connection: Any, rows: Rows, condition: Condition, values: Mapping[str, float]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]]:
    """Rows' places and codes, some at a time, in any order."""
    parameters = {**condition.parameters, **values}
    source = "scored"
    if condition.ranks:
        ranks = []
        for rank in condition.ranks:
            parameters |= rank.argument.parameters
            value = sound(rank.argument)
            order = f"PARTITION BY {_lacking(rank.argument.needs)}, {value} IS NULL ORDER BY {value}"
            ranks.append(
                f"CASE WHEN {value} IS NULL THEN NULL ELSE {rank.function}() OVER ({order}) END AS {rank.name}"
            )
        source = f"(SELECT *, {', '.join(ranks)} FROM scored)"
    nan = [f"WHEN isnan({column}) THEN {_NAN + i}" for i, column in enumerate(condition.needs)]
    verdict = f"CASE {' '.join(nan)} WHEN {condition.sql} THEN {_PASSES} WHEN NOT {condition.sql} THEN {_NOT}"
    query = f"SELECT place, ({verdict} ELSE {_UNKNOWN} END)::UTINYINT AS code FROM {source}"
    for batch in _run(connection, rows, condition, query, parameters):
        yield batch.column("place").to_numpy(), batch.column("code").to_numpy()


def _facts(connection: Any, rows: Rows, condition: Condition) -> dict[str, float]:
    """By its text, the value of each aggregate. Rows that lack a score that it needs are not in it."""
    quantiles = [a for a in condition.aggregates if a.share is not None]
    simple = [a for a in condition.aggregates if a.share is None]
    counts = [f"count({sound(a.argument)}){_only(a)}" for a in quantiles]
    first = _one_row(
        connection,
        rows,
        condition,
        [f"{a.function}({sound(a.argument)}){_only(a)}" for a in simple] + counts,
        [*simple, *quantiles],
    )
    found = dict(zip((a.text for a in simple), first, strict=False))
    shares = []
    for aggregate, count in zip(quantiles, first[len(simple) :], strict=True):
        # The order statistic that `select.quantile` takes, as a share by which DuckDB finds it.
        wanted = (math.floor((aggregate.share or 0.0) * (max(count, 1) - 1)) + 0.5) / max(count, 1)
        shares.append(f"quantile_disc({sound(aggregate.argument)}, {wanted!r}){_only(aggregate)}")
    found |= zip((a.text for a in quantiles), _one_row(connection, rows, condition, shares, quantiles), strict=True)
    facts = {}
    for aggregate in condition.aggregates:
        value = found[aggregate.text]
        if value is None or math.isnan(value):
            raise ExpressionError(f"{aggregate.text} has no value over these scores", condition.text, aggregate.place)
        facts[aggregate.text] = float(value)
    return facts


def _one_row(
    connection: Any, rows: Rows, condition: Condition, terms: Sequence[str], of: Sequence[Aggregate]
) -> list[Any]:
    if not terms:
        return []
    parameters = {name: value for a in of for name, value in a.argument.parameters.items()}
    query = f"SELECT {', '.join(f'{term} AS t{i}' for i, term in enumerate(terms))} FROM scored"
    batches = list(_run(connection, rows, condition, query, parameters))
    return list(pa.Table.from_batches(batches).to_pylist()[0].values())


def _only(aggregate: Aggregate) -> str:
    return f" FILTER (WHERE NOT ({_lacking(aggregate.argument.needs)}))"


def _lacking(columns: Iterable[str]) -> str:
    return " OR ".join(f"isnan({column})" for column in sorted(columns)) or "FALSE"


def _run(
    connection: Any, rows: Rows, condition: Condition, query: str, parameters: Mapping[str, Any]
) -> Iterator[pa.RecordBatch]:
    """A query over ``scored``, the tables' rows after one another: ``place`` and the condition's columns."""
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
    own.register("scored", pa.RecordBatchReader.from_batches(schema, batches()))
    try:
        yield from own.sql(query, params=dict(parameters)).to_arrow_reader(ROW_GROUP_ROWS)
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        if failed:
            raise failed[0] from error
        raise CorpusError(f"--where {condition.text}: {str(error).splitlines()[0]}") from error
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
