"""`assay two-stage`."""

from __future__ import annotations

from typing import Annotated

import typer

from assay.cli.runs import limit_threads, progress_of
from assay.cli.terminal import OK, Overrides, RecipeFile, Trust, log_to_stderr, say


def two_stage(
    recipe: RecipeFile,
    train: Annotated[str, typer.Option("--train", metavar="MODEL", help="Which of the recipe's models to train.")],
    held_out: Annotated[str, typer.Option("--held-out", metavar="DATA", help="Samples that nobody trains on.")],
    by: Annotated[str, typer.Option("--by", metavar="SCORE", help="The score to select by.")],
    top: Annotated[str, typer.Option(metavar="AMOUNT", help="The best: 1000 are rows, 0.5 is a share.")],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where the report goes.")],
    keep: Annotated[
        str | None, typer.Option(metavar="high|low", help="Which end is better, if not as the score says.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of every training.")] = 500,
    batch_size: Annotated[int, typer.Option(help="Samples per step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="AdamW's, at its highest.")] = 1e-4,
    seeds: Annotated[int, typer.Option(help="How often everything is trained.")] = 3,
    overrides: Overrides = None,
    trust: Trust = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")] = False,
) -> int:
    """Score, select, train a model on the selection, on as many random rows and on everything, and compare.

    Run again, it does only what is missing.
    """
    log_to_stderr(quiet)
    limit_threads()
    from assay.curate import parse_amount, parse_end
    from assay.recipe import load_recipe
    from assay.two_stage import Question, Training
    from assay.two_stage import two_stage as try_out

    question = Question(train, held_out, by, parse_amount(top), parse_end(keep))
    training = Training(steps, batch_size, learning_rate, seeds)
    loaded = load_recipe(recipe, overrides or (), trust or ())
    report = try_out(loaded, question, out, training, progress_of(quiet, 10.0))
    for line in report.markdown().splitlines():
        say(line)
    say(f"report: {out}/report.md, {out}/report.json")
    return OK
