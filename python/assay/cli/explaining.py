"""`assay explain`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from assay._json import dumps
from assay.cli.terminal import INCOMPLETE, OK, CorpusNow, ScoresFolder, fail, say

if TYPE_CHECKING:
    from assay.curate import Explained, Explanation, Fate


def explain(
    scores: ScoresFolder,
    sample: Annotated[str, typer.Argument(metavar="ID", help="A sample's id, or SHARD:ROW.")],
    selection: Annotated[
        str | None, typer.Option(metavar="DIR", help="What `assay select` wrote there: was it kept, and why?")
    ] = None,
    as_plain_json: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
    corpus: CorpusNow = None,
) -> int:
    """Show every score of one sample, and where it stands by each among all rows."""
    from assay.corpus.scores_folder import open_scores
    from assay.curate import explain as look_up

    found = look_up(open_scores(scores, corpus), sample, selection)
    if as_plain_json:
        print(dumps(_plain(found), indent=2))
    else:
        for i, one in enumerate(found.samples):
            for line in ([""] if i else []) + list(_lines(one, selection, found.rows)):
                say(line)
    if not found.left_out:
        return OK
    name, reason = next(iter(found.left_out.items()))
    return fail(f"{len(found.left_out)} shards were not looked at ({name}: {reason})", INCOMPLETE)


def _lines(one: Explained, selection: str | None, rows: int) -> Iterator[str]:
    where = f"{one.shard}:{one.row}"
    yield where if one.id in (None, where) else f"{one.id}  ({where})"
    if one.quarantined is not None:
        yield f"  quarantined: {one.quarantined}"
    if one.scores:
        width = max(5, *(len(score.name) for score in one.scores))
        yield f"  {'score':{width}}  {'value':>12}  {'percentile':>10}  better"
        for score in one.scores:
            share = "" if score.percentile is None else f"{score.percentile:.1f}"
            better = score.keep if score.keep in ("high", "low") else "-"
            yield f"  {score.name:{width}}  {score.value:12.6g}  {share:>10}  {better:6}  {score.description}".rstrip()
        yield f"  (percentile: how many of the others are smaller, in %, of {rows:,} scored rows, NaN aside)"
    if selection is not None:
        yield from _fate_lines(one, selection)


def _fate_lines(one: Explained, selection: str) -> Iterator[str]:
    fate = one.fate
    if fate is None:
        yield f"  {selection}: its shard is not in this selection"
        return
    yield f"  {selection} ({fate.rule}): {fate.reason}"
    yield from _comparison_lines(fate)
    if fate.distance is not None and fate.threshold is not None:
        side = "above" if fate.distance >= 0 else "below"
        whose = "the threshold" if fate.column is None else f"the threshold of its {fate.column}"
        yield f"    {fate.by} {fate.score:.6g} is {abs(fate.distance):.6g} {side} {whose} {fate.threshold:.6g}"
    if fate.column is not None:
        yield f"    its {fate.column}: {'none (null)' if fate.group is None else fate.group}"
    if fate.copies is not None:
        yield f"    {fate.copies} time{'' if fate.copies == 1 else 's'} in the output"
    if fate.weight is not None:
        yield f"    weight {fate.weight:.6g}"
    for name, value in fate.facts.items():
        yield f"    {name} = {value:.6g}"


def _comparison_lines(fate: Fate) -> Iterator[str]:
    """Each comparison of the condition, how it came out and by how much, and which alone decides."""
    if fate.untold is not None:
        yield f"    what its condition says cannot be told: {fate.untold}"
    width = max((len(one.text) for one in fate.where), default=0)
    for one in fate.where:
        said = {True: "so", False: "not so", None: "no value"}[one.holds]
        line = f"    {said:8}  {one.text:{width}}"
        if one.distance is not None:
            side = "above" if one.distance >= 0 else "below"
            line += f"  {one.left:.6g} is {abs(one.distance):.6g} {side} {one.right:.6g}"
        yield line.rstrip() + ("; this alone decides" if one.decides else "")


def _plain(found: Explanation) -> Any:
    """As what JSON has."""
    from assay.cli.values import as_json

    samples = []
    for one in found.samples:
        plain: dict[str, Any] = {"id": one.id, "shard": one.shard, "row": one.row}
        plain["scores"] = {s.name: {k: v for k, v in vars(s).items() if k != "name"} for s in one.scores}
        if one.quarantined is not None:
            plain["quarantined"] = one.quarantined
        if one.fate is not None:
            where = [vars(each) | {"distance": each.distance} for each in one.fate.where]
            plain["selection"] = vars(one.fate) | {"distance": one.fate.distance, "where": where}
        samples.append(plain)
    return as_json({"samples": samples, "rows": found.rows, "left_out": dict(found.left_out)})
