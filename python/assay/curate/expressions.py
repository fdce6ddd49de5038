"""A condition on scores, as a person writes it, made into SQL of known parts.

DuckDB's parser makes a tree of the text; of the tree only what is listed here is taken, and SQL is written anew from
it: nothing of the text itself is ever run. Numbers and texts are bound as parameters.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from assay.curate.condition import Aggregate, Comparison, Condition, ExpressionError, Kind, Piece, Rank, sound
from assay.curate.dataset import SHARD
from assay.curate.tree import Node, arguments_of, is_empty, positions_of, value_of, words_of
from assay.select.selection import as_score

_FUNCTIONS = ("abs", "ceil", "exp", "floor", "round")
# From where on a function has a value. Beyond, as over divisions by 0, versions of DuckDB differ: an error, NaN, null.
_FROM = {"ln": "> 0", "log2": "> 0", "log10": "> 0", "sqrt": ">= 0"}
_LONGEST = 100_000
_OPERATORS = ("+", "-", "*", "/", "%")
_POWERS = ("^", "**", "pow", "power")
_LIKES = {"~~": "LIKE", "!~~": "NOT LIKE"}
_COMPARISONS = {
    "COMPARE_EQUAL": "=",
    "COMPARE_NOTEQUAL": "<>",
    "COMPARE_LESSTHAN": "<",
    "COMPARE_GREATERTHAN": ">",
    "COMPARE_LESSTHANOREQUALTO": "<=",
    "COMPARE_GREATERTHANOREQUALTO": ">=",
}
_AGGREGATES = {
    "mean": "avg",
    "avg": "avg",
    "median": "median",
    "min": "min",
    "max": "max",
    "stddev": "stddev_samp",
    "sum": "sum",
    "count": "count",
}
_RANKS = ("percent_rank", "rank")
_QUANTILE = "quantile"
_OVER = sorted({*_AGGREGATES, *_RANKS, _QUANTILE} - {"avg"})
_OVER_SHARDS = f" over (partition by {SHARD})"
# What a window says when it says nothing.
_FRAME = {"start": "UNBOUNDED_PRECEDING", "end": "CURRENT_ROW_RANGE", "exclude_clause": "NO_OTHER"}
_KNOWN = sorted({*_FUNCTIONS, *_FROM, "pow", *_AGGREGATES, *_RANKS, _QUANTILE} - {"avg"})
_INSTEAD = {
    "log": "ln, log2 or log10, for it means either",
    "quantile_cont": "quantile",
    "quantile_disc": "quantile",
    "percentile": "quantile(score, 0.9)",
    "std": "stddev",
    "isnan": "nothing: a row whose score is NaN is never kept",
}


def compile_condition(text: str, tree: Node, kinds: Mapping[str, Kind], location: Callable[[int], int]) -> Condition:
    """Check a parsed expression and write it in SQL.

    Args:
        text: the expression.
        tree: DuckDB's of it.
        kinds: by name, what the columns hold.
        location: from the parser's positions to the text's.

    Raises:
        ExpressionError: it has a part that is not listed here, names a column that is not there, or is no condition.
    """
    compiler = _Compiler(text, kinds, location)
    piece = compiler.compile(tree)
    if piece.kind != "condition":
        raise compiler.error(tree, f"{piece.text} is a {piece.kind}; expected a condition, as {piece.text} > 0", 0)
    if not compiler.columns:
        raise compiler.error(tree, f"names no score; expected a condition on {_some(list(kinds))}", 0)
    needs = tuple(column for column in compiler.columns.values() if column in piece.needs)
    columns = {column: name for name, column in compiler.columns.items()}
    aggregates, ranks = tuple(compiler.aggregates.values()), tuple(compiler.ranks.values())
    comparisons = tuple(compiler.comparisons)
    assert piece.logic is not None
    return Condition(text, piece.sql, piece.parameters, columns, needs, aggregates, ranks, comparisons, piece.logic)


class _Compiler:
    def __init__(self, text: str, kinds: Mapping[str, Kind], location: Callable[[int], int]) -> None:
        self.columns: dict[str, str] = {}
        self.aggregates: dict[tuple[Any, ...], Aggregate] = {}
        self.ranks: dict[tuple[Any, ...], Rank] = {}
        self.comparisons: list[Comparison] = []
        self._text, self._kinds, self._location = text, kinds, location
        self._bound = 0
        self._classes: dict[str, Callable[[Node], Piece]] = {
            "COLUMN_REF": self._column,
            "CONSTANT": self._constant,
            "COMPARISON": self._comparison,
            "BETWEEN": self._between,
            "CONJUNCTION": self._conjunction,
            "OPERATOR": self._operator,
            "FUNCTION": self._function,
            "WINDOW": self._window,
        }

    def compile(self, node: Node) -> Piece:
        kind = str(node.get("class"))
        if kind not in self._classes:
            raise self.error(node, f"{kind.lower().replace('_', ' ')}s cannot be asked for; {_ALLOWED}")
        return self._classes[kind](node)

    def error(self, node: Node, message: str, place: int | None = None) -> ExpressionError:
        return ExpressionError(message, self._text, self.place(node) if place is None else place)

    def place(self, node: Node) -> int | None:
        """Where in the text the node begins, if it or what is below it says so."""
        found = min(positions_of(node), default=None)
        return None if found is None else self._location(found)

    # ---- leaves

    def _column(self, node: Node) -> Piece:
        self._only(node, "column_names")
        name = ".".join(map(str, node["column_names"]))
        if name not in self._kinds:
            near = difflib.get_close_matches(name, self._kinds, n=3, cutoff=0.5)
            known = f"did you mean {' or '.join(near)}?" if near else f"there are {_some(list(self._kinds))}"
            raise self.error(node, f"there is no score {name}; {known}")
        column = self.columns.setdefault(name, f"c{len(self.columns)}")
        if self._kinds[name] == "condition":
            self.comparisons.append(Comparison(name, column, frozenset(), ()))
            return Piece(column, "condition", name, plain=True, logic=len(self.comparisons) - 1)
        is_number = self._kinds[name] == "number"
        needs = frozenset([column]) if is_number else frozenset()
        return Piece(column, self._kinds[name], name, needs, plain=True, is_score=is_number and name != "row")

    def _constant(self, node: Node) -> Piece:
        self._only(node, "literal", "value")
        value = value_of(node)
        if value is None:
            raise self.error(node, "expected a finite decimal number or a text; a row whose score is NaN is never kept")
        name = f"p{(bound := self._bound)}"
        self._bound = bound + 1
        kind: Kind = "text" if isinstance(value, str) else "number"
        shown = repr(value) if isinstance(value, str) else repr(value).removesuffix(".0")
        return Piece(f"${name}", kind, shown, parameters={name: value}, plain=True)

    # ---- conditions

    def _comparison(self, node: Node) -> Piece:
        self._only(node, "left", "right")
        if node["type"] not in _COMPARISONS:
            raise self.error(node, f"{words_of(node)} cannot be asked for; {_ALLOWED}")
        sides = self._alike(node, [node["left"], node["right"]])
        return self._compared(f"({{}} {_COMPARISONS[node['type']]} {{}})", sides)

    def _between(self, node: Node) -> Piece:
        self._only(node, "input", "lower", "upper")
        value, lower, upper = self._alike(node, [node["input"], node["lower"], node["upper"]])
        whole = self._made("({} BETWEEN {} AND {})", [value, lower, upper])
        ends = [self._compared("({} >= {})", [value, lower]), self._compared("({} <= {})", [value, upper])]
        return replace(whole, logic=("and", *(end.logic for end in ends)))

    def _conjunction(self, node: Node) -> Piece:
        self._only(node, "children")
        word = {"CONJUNCTION_AND": " AND ", "CONJUNCTION_OR": " OR "}[node["type"]]
        pieces = [self._expect(child, "condition") for child in node["children"]]
        made = self._made(f"({word.join(['{}'] * len(pieces))})", pieces)
        return replace(made, logic=(word.strip().lower(), *(piece.logic for piece in pieces)))

    def _operator(self, node: Node) -> Piece:
        self._only(node, "children")
        children = node["children"]
        if node["type"] == "OPERATOR_NOT":
            inner = self._expect(children[0], "condition")
            return replace(self._made("(NOT {})", [inner]), logic=("not", inner.logic))
        words = {"COMPARE_IN": "IN", "COMPARE_NOT_IN": "NOT IN"}
        if node["type"] not in words:
            raise self.error(node, f"{words_of(node)} cannot be asked for; {_ALLOWED}")
        pieces = self._alike(node, children)
        return self._compared(f"({{}} {words[node['type']]} ({', '.join(['{}'] * (len(pieces) - 1))}))", pieces)

    # ---- functions

    def _function(self, node: Node) -> Piece:
        self._only(node, "function_name", "arguments", "children", "is_operator", "qualified_name")
        name, children = str(node["function_name"]).lower(), arguments_of(node)
        self._plain_name(node)
        if name in _LIKES:
            return self._compared(f"({{}} {_LIKES[name]} {{}})", [self._expect(child, "text") for child in children])
        if name in _OPERATORS and len(children) in (1, 2):
            pieces = [self._expect(child, "number") for child in children]
            if len(pieces) == 1 and (bound := pieces[0].constant):  # versions of DuckDB read -1 in two ways
                value = -bound[1] if name == "-" else bound[1]
                return replace(pieces[0], text=f"{name}{pieces[0].text}", parameters={bound[0]: value})
            if len(pieces) == 1:
                return self._number(f"({name}{{}})", pieces)
            divisor = "CASE WHEN {1} <> 0 THEN {1} END" if name in "/%" else "{1}"
            return self._number(f"({{0}} {name} {divisor})", pieces, f"({{}} {name} {{}})")
        if name in _POWERS:
            pieces, power = self._arguments(node, "pow", 2), value_of(children[1])
            if not isinstance(power, float) or power < 0:  # versions of DuckDB differ over 0 to the power of -1
                raise self.error(node, f"{name}: expected its power as a number from 0 on, as pow(score, 2)")
            return self._number("pow({}, {})", pieces)
        if name in _FUNCTIONS:
            return self._number(f"{name}({{}})", self._arguments(node, name, 1))
        if name in _FROM:
            sql = f"CASE WHEN {{0}} {_FROM[name]} THEN {name}({{0}}) END"
            return self._number(sql, self._arguments(node, name, 1), f"{name}({{}})")
        found = self._over_rows(node, name, by_shard=False)
        if found is None:
            near = difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.7)
            advice = _INSTEAD.get(name) or (near[0] if near else f"one of {', '.join(_KNOWN)}")
            raise self.error(node, f"there is no function {name}; take {advice}")
        return found

    def _window(self, node: Node) -> Piece:
        """An aggregate or a rank ``OVER (PARTITION BY shard)``."""
        self._only(node, "function_name", "arguments", "children", "qualified_name", "partitions", *_FRAME)
        by = [part.get("column_names") for part in node["partitions"]]
        if by != [[SHARD]] or any(node[key] != value for key, value in _FRAME.items()):
            raise self.error(node, f"expected OVER (PARTITION BY {SHARD}), and nothing else in it")
        self._plain_name(node)
        self.columns.setdefault(SHARD, f"c{len(self.columns)}")
        found = self._over_rows(node, str(node["function_name"]).lower(), by_shard=True)
        if found is None:
            raise self.error(node, f"{node['function_name']}: expected one of {', '.join(_OVER)} before OVER")
        return found

    def _over_rows(self, node: Node, name: str, by_shard: bool) -> Piece | None:
        """A number of many rows; None if this is no such function."""
        if name == "count_star" or (name == "count" and not arguments_of(node)):
            return self._aggregate(node, "count", Piece("1", "number", "*", plain=True), by_shard)
        if name in _AGGREGATES:
            return self._aggregate(node, name, self._arguments(node, name, 1)[0], by_shard)
        if name == _QUANTILE:
            return self._aggregate(node, name, *self._quantile(node, by_shard))
        return self._rank(node, name, by_shard) if name in _RANKS else None

    def _aggregate(self, node: Node, name: str, argument: Piece, by_shard: bool, share: float | None = None) -> Piece:
        text = f"{name}({argument.text})" if share is None else f"{name}({argument.text}, {share!r})"
        text += _OVER_SHARDS if by_shard else ""
        self._alone(node, text, argument)
        key = name, argument.sql, share, by_shard
        if key not in self.aggregates:
            function, place = _AGGREGATES.get(name, name), self.place(node)
            self.aggregates[key] = Aggregate(
                f"a{len(self.aggregates)}", function, argument, text, place, share, by_shard
            )
        bound = self.aggregates[key].name
        return Piece(bound if by_shard else f"${bound}", "number", text, plain=True, inside=text)

    def _quantile(self, node: Node, by_shard: bool) -> tuple[Piece, bool, float]:
        children = arguments_of(node)
        if len(children) != 2:
            raise self.error(node, "quantile: expected a score and a share, as quantile(score, 0.9)")
        argument = self._expect(children[0], "number")
        share = value_of(children[1])
        if not isinstance(share, float) or not 0 <= share <= 1:
            raise self.error(node, "quantile: expected its share as a number from 0 to 1, as quantile(score, 0.9)")
        return argument, by_shard, share

    def _rank(self, node: Node, name: str, by_shard: bool) -> Piece:
        (argument,) = self._arguments(node, name, 1)
        text = f"{name}({argument.text}){_OVER_SHARDS if by_shard else ''}"
        self._alone(node, text, argument)
        made = Rank(f"r{len(self.ranks)}", name, argument, by_shard)
        # The argument's parameters are the rank's: they are bound where its column is made.
        bound = self.ranks.setdefault((name, argument.sql, by_shard), made).name
        return Piece(bound, "number", text, argument.needs, plain=True, inside=text)

    def _alone(self, node: Node, text: str, argument: Piece) -> None:
        if argument.inside:
            raise self.error(node, f"{text} has {argument.inside} inside; expected a score, or arithmetic on scores")
        if not argument.needs and argument.text != "*":
            raise self.error(node, f"{text}: expected a score inside")

    # ---- what all have in common

    def _plain_name(self, node: Node) -> None:
        name = node["function_name"]
        path = node.get("qualified_name", {"path": [name]})["path"]
        if path != [name] or any(argument["name"] for argument in node.get("arguments", ())):
            raise self.error(node, f"{name}: cannot be asked for with a schema or names of arguments")

    def _arguments(self, node: Node, name: str, count: int) -> list[Piece]:
        children = arguments_of(node)
        if len(children) != count:
            raise self.error(node, f"{name}: expected {count} argument{'s' if count > 1 else ''}, got {len(children)}")
        return [self._expect(child, "number") for child in children]

    def _expect(self, node: Node, kind: Kind) -> Piece:
        piece = self.compile(node)
        if piece.kind != kind:
            raise self.error(node, f"{piece.text} is a {piece.kind}; expected a {kind}")
        return piece

    def _alike(self, node: Node, children: Sequence[Node]) -> list[Piece]:
        """Numbers, or texts, that are compared with each other."""
        pieces = [self.compile(child) for child in children]
        kinds = {piece.kind for piece in pieces}
        if len(kinds) > 1 or "condition" in kinds:
            found = " and ".join(f"{piece.text} is a {piece.kind}" for piece in pieces[:2])
            raise self.error(node, f"{found}; expected two numbers or two texts to compare")
        return [_as_score(piece) for piece in pieces] if any(piece.is_score for piece in pieces) else pieces

    def _made(self, sql: str, pieces: Sequence[Piece]) -> Piece:
        """A condition of ``pieces``, at the places ``{}`` of ``sql``."""
        parts = [sound(piece) if piece.kind == "number" else piece.sql for piece in pieces]
        return _joined(sql, "condition", parts, pieces)

    def _compared(self, sql: str, pieces: Sequence[Piece]) -> Piece:
        """The same where ``pieces`` are no conditions: what a row is told of. Of two numbers also how they differ."""
        made = self._made(sql, pieces)
        numbers = len(pieces) == 2 and all(piece.kind == "number" for piece in pieces)
        sides = tuple(sound(piece) for piece in pieces) if numbers else ()
        self.comparisons.append(Comparison(made.text[1:-1], made.sql, made.needs, sides))
        return replace(made, logic=len(self.comparisons) - 1)

    def _number(self, sql: str, pieces: Sequence[Piece], shown: str | None = None) -> Piece:
        made = _joined(sql, "number", [piece.sql for piece in pieces], pieces, shown)
        if len(made.sql) > _LONGEST:  # some functions name what is inside twice
            raise ExpressionError("is nested too deep", self._text)
        return made

    def _only(self, node: Node, *read: str) -> None:
        """ExpressionError if a node says more than what is read of it: an alias, a filter, an order."""
        for key, value in node.items():
            if key not in ("class", "type", "query_location", "query_location_length", *read) and not is_empty(value):
                raise self.error(node, f"{key.replace('_', ' ')}: cannot be asked for; {_ALLOWED}")


_ALLOWED = "expected scores, numbers, texts, comparisons, AND, OR, NOT, IN, BETWEEN, LIKE, arithmetic and functions"


def _as_score(piece: Piece) -> Piece:
    """A number that scores are compared with, as a score is one."""
    bound = piece.constant
    return piece if bound is None else replace(piece, parameters={bound[0]: as_score(bound[1])})


def _joined(sql: str, kind: Kind, parts: Sequence[str], pieces: Sequence[Piece], shown: str | None = None) -> Piece:
    needs = frozenset().union(*(piece.needs for piece in pieces))
    parameters: dict[str, float | str] = {}
    for piece in pieces:
        parameters |= piece.parameters
    text = (shown or sql).format(*(piece.text for piece in pieces))
    return Piece(
        sql.format(*parts), kind, text, needs, parameters, inside=next((p.inside for p in pieces if p.inside), "")
    )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:12])
    return shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more"
