"""`assay select`."""

from __future__ import annotations

from typing import Annotated

import typer

from assay.cli.terminal import INCOMPLETE, OK, CorpusNow, ScoresFolder, fail, say


def select(
    scores: ScoresFolder,
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where the curated corpus goes.")],
    by: Annotated[str | None, typer.Option("--by", metavar="SCORE", help="The score to judge by.")] = None,
    top: Annotated[
        str | None,
        typer.Option(metavar="AMOUNT", help="The best: 1000 are rows, 0.5 is a share, 1.0 is all."),
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="This score or better.")] = None,
    quantile: Annotated[
        float | None, typer.Option(help="From this quantile of worth on: 0.9 is the best tenth.")
    ] = None,
    gmm: Annotated[bool, typer.Option("--gmm", help="The better of two Gaussians.")] = False,
    kmeans: Annotated[bool, typer.Option("--kmeans", help="The better of two groups of least squared error.")] = False,
    sample: Annotated[str | None, typer.Option(metavar="AMOUNT", help="Draw in proportion to the score.")] = None,
    random: Annotated[str | None, typer.Option(metavar="AMOUNT", help="Draw uniformly: the control.")] = None,
    keep: Annotated[
        str | None, typer.Option(metavar="high|low", help="Which end is better, if not as the table says.")
    ] = None,
    seed: Annotated[int, typer.Option(help="For --sample, --random and --gmm.")] = 0,
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
    corpus: CorpusNow = None,
) -> int:
    """Write the part of the corpus that is worth keeping, with a manifest and a reason per row."""
    from assay.curate import RuleOptions, curate

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
    )
    curated = curate(scores, by, options.rule(), out, corpus, form)
    dropped = curated.rows - curated.kept - curated.quarantined
    say(curated.selection.summary())
    print(
        f"rows in {curated.rows:,} = kept {curated.kept:,} + dropped {dropped:,} + quarantined {curated.quarantined:,}"
    )
    say(f"{'corpus' if form == 'shards' else form}: {out}")
    return fail(curated.missing, INCOMPLETE) if curated.missing else OK
