"""`assay two-stage` and `assay prove`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from assay.cli.runs import limit_threads, progress_of
from assay.cli.terminal import INCOMPLETE, OK, Overrides, RecipeFile, Trust, log_to_stderr, say

if TYPE_CHECKING:
    from assay.curate.proofs import Claim, Proof
    from assay.two_stage import Cost


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


def prove(
    recipe: RecipeFile,
    train: Annotated[str, typer.Option("--train", metavar="MODEL", help="Which of the recipe's models to train.")],
    held_out: Annotated[str, typer.Option("--held-out", metavar="DATA", help="Samples that nobody trains on.")],
    by: Annotated[
        list[str],
        typer.Option(
            "--by",
            metavar="SCORE",
            help="A score to prove, or SCORE=low, where it does not say which end is better. May be given again.",
        ),
    ],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where the proof goes.")],
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SCORE",
            help="A control beside random rows. May be given again. Without it: reference losses, BM25 and n-grams, "
            "where the recipe has them.",
        ),
    ] = None,
    top: Annotated[str, typer.Option(metavar="AMOUNT", help="How much of each part of the corpus is chosen.")] = "0.5",
    pools: Annotated[int, typer.Option(help="Random parts to divide the corpus into; 6 at least.")] = 8,
    steps: Annotated[int, typer.Option(help="Steps of every training.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Samples per step.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="AdamW's, at its highest.")] = 1e-3,
    overrides: Overrides = None,
    trust: Trust = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")] = False,
) -> int:
    """Does a score predict anything on this corpus? Train on what it chooses, and on what its controls choose.

    Run again, it does only what is missing. Exit status 1: a score is not better than random rows.
    """
    log_to_stderr(quiet)
    limit_threads()
    from assay.curate import parse_amount
    from assay.recipe import load_recipe
    from assay.two_stage import Comparison, Trainee, Training
    from assay.two_stage import prove as try_out

    scores, controls = ([_score_and_end(text)[0] for text in names] for names in (by, against or ()))
    keep = _ends((*by, *(against or ())))
    comparison = Comparison(scores, None if against is None else controls, parse_amount(top), pools, keep)
    training = Training(steps, batch_size, learning_rate, evaluations=1)
    loaded = load_recipe(recipe, overrides or (), trust or ())
    progress = progress_of(quiet, 10.0)
    proof = try_out(loaded, Trainee(train, held_out), comparison, out, training, progress, _say_cost)
    _say_proof(proof, out)
    return OK if all(claim.proved for claim in proof.claims.values()) else INCOMPLETE


def _score_and_end(text: str) -> tuple[str, Literal["high", "low"] | None]:
    from assay.curate import parse_end

    name, equals, end = text.partition("=")
    return name, parse_end(end if equals else None)


def _ends(texts: Sequence[str]) -> dict[str, Literal["high", "low"]]:
    ends: dict[str, Literal["high", "low"]] = {}
    for name, end in map(_score_and_end, texts):
        if end is not None and ends.setdefault(name, end) != end:
            raise ValueError(f"{name}: both ends of it are named; prove one, and the other in a folder of its own")
    return ends


def _say_cost(cost: Cost) -> None:
    done = f", {cost.done} of them done before" if cost.done else ""
    say(f"{cost.trainings} trainings{done}; the others take about {cost.seconds / 60:.1f} min")


def _say_proof(proof: Proof, out: str) -> None:
    for name, losses in proof.losses.items():
        say(f"held-out loss after {name}: {sum(losses) / len(losses):.4f}, mean of {len(losses)} parts")
    for name, claim in proof.claims.items():
        for control, gain in claim.gains.items():
            say(f"{name} over {control}: {gain.estimate:+.4f} (95 %: {gain.low:+.4f} to {gain.high:+.4f})")
        say(f"{name}: {_verdict(claim)}")
    say(f"proof: {out}/proof.json; assay select --proved {out} asks it")


def _verdict(claim: Claim) -> str:
    beaten = ", ".join(claim.beaten)
    if claim.proved:
        told = f"proved: better than {beaten}"
    elif beaten:
        told = f"not proved: no better than random rows, though better than {beaten}"
    else:
        told = "not proved: better than none of its controls"
    return told + (f"; worse than {', '.join(claim.better)}" if claim.better else "")
