"""Mixes: a rate for each band of worth in each group."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from assay.select.best import parts_of, spans
from assay.select.groups import NONE, Groups, best_of_each, cells, groups_of
from assay.select.rules import Keep, uniforms
from assay.select.selection import UNSCORED, Floats, Selection, oriented

OTHERS = "*"
MOST_BANDS, MOST_COPIES = 20, 100
Rates = Sequence[float] | Mapping[str | None, Sequence[float]]


def mix(
    table: pa.Table,
    by: str,
    bands: Sequence[float],
    rates: Rates,
    seed: int,
    keep: Keep | None = None,
    group: str | None = None,
) -> Selection:
    """Take each band of worth at a rate of its own, in each group: 0.2 draws a fifth of its rows, 2.5 takes each row
    twice and half of them once more.

    Args:
        bands: where bands begin and end, in per cent of a group's scored rows from the worst to the best: [0, 50, 90,
            100] has three, of which the last is the best tenth. Of equal scores the earlier row is the better.
        rates: one per band; with ``group`` by its values, a null's under None, and those that are not named under "*".
        seed: of the draws. How many of a band's rows are taken is no matter of chance: its rows times its rate, rounded
            up or down so that over all groups they add up.
        group: a column of the table.

    Returns:
        a Selection whose ``copies`` say how often each row is to be there.
    """
    check_bands(bands)
    score = oriented(table, by, keep)
    if group is None:
        groups = Groups(np.zeros(table.num_rows, np.int32), pa.nulls(1, pa.string()))
        rates = rates if isinstance(rates, Mapping) else {OTHERS: rates}
    else:
        groups = groups_of(table, group)
    each = _rates_of_each(groups, rates, len(bands) - 1, group)
    counts = groups.counts(score.valid)
    edges = [np.floor((100.0 - bound) / 100.0 * counts + 0.5).astype(np.int64) for bound in bands[-2:0:-1]]
    cell = cells(lambda: parts_of(score.values), groups, np.array(edges, np.int64).reshape(len(bands) - 2, len(groups)))
    copies = _copies(cell, groups, each, seed)
    return _selection(by, cell, copies, bands, seed, group)


def check_bands(bands: Sequence[float]) -> None:
    """ValueError unless they ascend from 0 to 100."""
    if len(bands) < 2 or bands[0] != 0 or bands[-1] != 100 or not all(a < b for a, b in pairwise(bands)):
        raise ValueError(f"bands={list(bands)}: expected percentages that ascend from 0 to 100, as [0, 50, 90, 100]")
    if len(bands) > MOST_BANDS + 1:
        raise ValueError(f"bands: {len(bands) - 1} bands; expected at most {MOST_BANDS}")


def check_rates(name: str | None, rates: Sequence[float], bands: int) -> None:
    """ValueError unless they are one for each band, from 0 to MOST_COPIES."""
    shown = "null" if name is None else name
    if len(rates) != bands:
        raise ValueError(f"rates of {shown}: {len(rates)} for {bands} bands; expected one for each")
    for rate in rates:
        if not 0 <= rate <= MOST_COPIES:
            raise ValueError(f"rates of {shown}: {rate}: expected a number from 0 to {MOST_COPIES}")


def _rates_of_each(groups: Groups, rates: Rates, bands: int, group: str | None) -> Floats:
    """(G, bands)."""
    if not isinstance(rates, Mapping):
        raise ValueError(f"rates: expected them by {group}, as {{'wiki': [0, 1, 2], '*': [0, 0.5, 1]}}")
    for name, own in rates.items():
        check_rates(name, own, bands)
    found = np.tile(np.array(rates.get(OTHERS, [math.nan] * bands), np.float64), (len(groups), 1))
    named = [name for name in rates if name != OTHERS]
    kind = groups.names.type
    texts = groups.names if group is None or kind == pa.string() else groups.names.cast(pa.string())
    places = pc.index_in(pa.array(named, pa.string()), value_set=texts).to_pylist()
    for name, place in zip(named, places, strict=True):
        if place is None:
            near = difflib.get_close_matches(str(name), [str(t) for t in texts[:1000].to_pylist()], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"rates of {'null' if name is None else name}: no row has this {group}{hint}")
        found[place] = rates[name]
    if (lacks := np.isnan(found[:, 0])).any():
        name = texts[int(np.argmax(lacks))].as_py() or "null"
        raise ValueError(
            f"rates: {int(lacks.sum()):,} values of {group} have none ({name}); add them, or rates of '*' for those "
            "that are not named"
        )
    return found


def _copies(cell: npt.NDArray[np.uint8], groups: Groups, rates: Floats, seed: int) -> npt.NDArray[np.uint8]:
    """How often each row is taken: as often as the rate has ones, and for its fraction those of a draw once more."""
    bands = rates.shape[1]
    if len(groups) * bands >= 1 << 31:
        raise ValueError(f"{len(groups):,} groups of {bands} bands are more than can be told apart; take fewer")
    codes = np.empty(len(cell), np.int32)
    for span in spans(len(cell)):
        band = bands - 1 - np.where(cell[span] == NONE, 0, cell[span]).astype(np.int32)
        codes[span] = groups.codes[span] * np.int32(bands) + band
    each = Groups(codes, pa.nulls(len(groups) * bands))
    flat = rates.ravel()
    whole = np.floor(flat).astype(np.uint8)
    exact = ((flat - whole) * each.counts(cell != NONE)).reshape(rates.shape)
    # What a group's rounding gives or takes the next one's makes good, in an order that is drawn: at a rate of 0.5 half
    # of the groups of one row have it, and no group by its place.
    order = np.argsort(np.random.Philox((seed, 1)).random_raw(len(groups)), kind="stable")
    ends = np.floor(np.cumsum(exact[order], axis=0) + 0.5).astype(np.int64)
    shares = np.zeros_like(exact, np.int64)
    shares[order] = np.diff(ends, axis=0, prepend=0)
    wanted = shares.ravel()

    def keys() -> Iterator[npt.NDArray[Any]]:
        for span, drawn in zip(spans(len(cell)), uniforms(len(cell), seed), strict=True):
            yield np.where(cell[span] == NONE, np.nan, -drawn)

    copies = best_of_each(keys, each, wanted).astype(np.uint8) if wanted.any() else np.zeros(len(cell), np.uint8)
    for span in spans(len(cell)):
        copies[span] += whole[codes[span]]
    copies[cell == NONE] = 0
    return copies


def _selection(
    by: str,
    cell: npt.NDArray[np.uint8],
    copies: npt.NDArray[np.uint8],
    bands: Sequence[float],
    seed: int,
    group: str | None,
) -> Selection:
    of_its = "" if group is None else f" of its {group}"
    legend = ["", "", f"dropped: {by} is NaN"]
    for low, high in pairwise(bands):
        place = f"{by} in the band {low:g}-{high:g} %{of_its}"
        legend += [f"dropped: not drawn, {place}", f"kept: {place}"]
    mask = copies > 0
    first = 3 + 2 * (len(bands) - 2)
    codes = np.where(cell == NONE, np.uint8(UNSCORED), (first - 2 * cell + mask).astype(np.uint8))
    of_each = "" if group is None else f" of each {group}"
    rule = f"{by}, a mix of {len(bands) - 1} bands{of_each}, seed {seed}"
    return Selection(rule, mask, codes, tuple(legend), copies=copies)
