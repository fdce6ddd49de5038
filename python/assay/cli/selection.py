"""`assay select`."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from assay.cli.terminal import BAD, INCOMPLETE, OK, CorpusNow, ScoresFolder, clean, fail, say

if TYPE_CHECKING:
    from collections.abc import Iterator

    from assay.select import Cut, GroupCuts


def select(
    scores: ScoresFolder,
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where the curated corpus goes.")],
    where: Annotated[
        str | None,
        typer.Option(
            metavar="CONDITION",
            help="Only rows of which this is so: 'mimic > 0 and loss < quantile(loss, 0.9)'. Without a rule all such "
            "rows; with one, it chooses among them.",
        ),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="NAME=DIR",
            help="Another run's scores of the same corpus, which --where then calls NAME.score; or a selection of "
            "these scores, NAME.kept. May be given again.",
        ),
    ] = None,
    by: Annotated[str | None, typer.Option("--by", metavar="SCORE", help="The score to judge by.")] = None,
    top: Annotated[
        str | None,
        typer.Option(metavar="AMOUNT", help="The best: 1000 are rows, 0.5 is a share, 1.0 is all."),
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="This score or better.")] = None,
    quantile: Annotated[
        float | None, typer.Option(help="From this quantile of worth on: 0.9 is the best tenth.")
    ] = None,
    ccs: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT",
            help="So many from 50 strata of difficulty alike, without the hardest; see --hard, --drop.",
        ),
    ] = None,
    hard: Annotated[
        str | None, typer.Option(metavar="high|low", help="For --ccs: which end of the score is hard.")
    ] = None,
    drop: Annotated[
        float | None, typer.Option(metavar="SHARE", help="For --ccs: how many of the hardest are dropped first. [0.1]")
    ] = None,
    gmm: Annotated[bool, typer.Option("--gmm", help="The better of two Gaussians.")] = False,
    kmeans: Annotated[bool, typer.Option("--kmeans", help="The better of two groups of least squared error.")] = False,
    sample: Annotated[str | None, typer.Option(metavar="AMOUNT", help="Draw in proportion to the score.")] = None,
    random: Annotated[str | None, typer.Option(metavar="AMOUNT", help="Draw uniformly: the control.")] = None,
    mix: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A rate for each band of worth, perhaps by group, as a file of YAML says."),
    ] = None,
    audit: Annotated[
        str | None,
        typer.Option(
            metavar="LABELS",
            help="Cut where F_beta is greatest on a labelled sample: CSV with label (1 or 0) and id, or shard and row.",
        ),
    ] = None,
    beta: Annotated[
        float | None, typer.Option(help="For --audit: above 1 it is worse to miss good rows than to keep bad ones. [1]")
    ] = None,
    group: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN", help="Choose in each group: a column of the corpus, or shard. An amount is of each group."
        ),
    ] = None,
    keep: Annotated[
        str | None, typer.Option(metavar="high|low", help="Which end is better, if not as the table says.")
    ] = None,
    seed: Annotated[int, typer.Option(help="For --sample, --random, --mix, --ccs, --gmm and --audit.")] = 0,
    temperature: Annotated[
        float | None, typer.Option(help="For --sample and --format weights: softmax(worth / temperature).")
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="shards|indices|weights|datasets",
            help="The rows in their own files, their indices, their ids with weights, or a folder for load_dataset.",
        ),
    ] = "shards",
    proved: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Only if `assay prove` found there that --by is better than random rows."),
    ] = None,
    corpus: CorpusNow = None,
) -> int:
    """Write the part of the corpus that is worth keeping, with a manifest and a reason per row."""
    from assay.curate import ExpressionError, RuleOptions, check_proof, curate, read_labels, read_mix

    mixed = None if mix is None else read_mix(mix)
    options = RuleOptions(
        top,
        threshold,
        quantile,
        gmm,
        kmeans,
        sample,
        random,
        by=by,
        keep=keep,
        seed=seed,
        temperature=temperature,
        weigh=form == "weights",
        where=where,
        mix=mixed,
        group=group,
        audit=None if audit is None else read_labels(audit),
        beta=beta,
        ccs=ccs,
        hard=hard,
        drop=drop,
    )
    rule = options.rule()
    if proved is not None:
        if options.both_ends is not None:
            raise ValueError(
                f"--proved {proved}: is about one end of {by}, and --{options.both_ends} takes rows of both; take "
                "another rule, such as --top"
            )
        check_proof(proved, scores, by if options.judges else None, corpus, keep)
    try:
        curated = curate(scores, by, rule, out, corpus, form, where, _beside(beside or []), group, mixed)
    except ExpressionError as error:
        return _point(error)
    dropped = curated.rows - curated.kept - curated.quarantined
    if curated.where:
        say(f"where {curated.where.condition.line}: {curated.where.summary()}")
    say(curated.selection.summary())
    for line in _audited(curated.cut, by or "", group):
        say(line)
    if curated.groups is not None:
        say(f"groups of {group}: {len(curated.groups):,}, each with its counts in {out}/_groups.parquet")
    print(
        f"rows in {curated.rows:,} = kept {curated.kept:,} + dropped {dropped:,} + quarantined {curated.quarantined:,}"
    )
    say(f"{'corpus' if form == 'shards' else form}: {out}")
    return fail(curated.missing, INCOMPLETE) if curated.missing else OK


_MOST_LINES = 20


def _audited(cut: Cut | GroupCuts | None, by: str, group: str | None) -> Iterator[str]:
    """What the labels say of the cuts, one line for each."""
    if cut is None:
        return
    from assay.select import GroupCuts
    from assay.select.auditing import LEAST

    if not isinstance(cut, GroupCuts):
        yield f"audit: {_told(cut, by)}"
        return
    for name, own in list(cut.cuts.items())[:_MOST_LINES]:
        yield f"audit: {group} {name}: {_told(own, by)}"
    if (more := len(cut.cuts) - _MOST_LINES) > 0:
        yield f"audit: and {more:,} more of {group}, which the manifest has"
    few = ", ".join(f"{name} ({rows})" for name, rows in list(cut.few.items())[:_MOST_LINES])
    yield f"audit: {group} without a cut of its own, as all labels together: {_told(cut.pooled, by)}"
    if few:
        yield f"audit: fewer than {LEAST} labels, or of one kind: {few}{', …' if len(cut.few) > _MOST_LINES else ''}"


def _told(cut: Cut, by: str) -> str:
    low, high = cut.threshold_interval
    held_out = "" if math.isnan(cut.f_held_out) else f"; on labels held out {cut.f_held_out:.3f}"
    line = f"{by} cut at {cut.threshold:.6g} (95 %: {low:.6g} to {high:.6g}), F{cut.beta:g} {cut.f:.3f} "
    line += f"(95 %: {cut.f_interval[0]:.3f} to {cut.f_interval[1]:.3f}{held_out}), "
    line += f"precision {cut.precision:.3f}, recall {cut.recall:.3f}, {cut.rows:,} labels"
    return line + (f", {cut.unscored:,} of them on rows that no cut keeps" if cut.unscored else "")


def _beside(given: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals or not folder:
            raise ValueError(f"--with {text}: expected NAME=DIR, as in other=scores-of-another-run")
        if name in found:
            raise ValueError(f"--with {text}: {name} is {found[name]} already; expected another name")
        found[name] = folder
    return found


def _point(error: ValueError) -> int:
    """The error's line, and below it the condition with a caret under the place."""
    line, *shown = str(error).split("\n")
    code = fail(line, BAD)
    for below in shown:
        print(clean(below), file=sys.stderr)
    return code
