"""`assay init` and `assay validate`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from assay._json import dumps
from assay.cli.terminal import INCOMPLETE, OK, CorpusNow, Overrides, Trust, fail, log_to_stderr, say

if TYPE_CHECKING:
    from assay.corpus.validation import Validated

_LISTED_PROBLEMS = 50


def init(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A file, folder or glob; the corpus to score.")],
    model: Annotated[
        str | None, typer.Option(metavar="PATH", help="A model's folder, a .gguf file, or .safetensors.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="PATH", help="A better model: the same one trained further, say.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="PATH", help="Samples of what the model is to become better at.")
    ] = None,
    out: Annotated[str, typer.Option(metavar="FILE", help="Where the recipe goes.")] = "recipe.yaml",
) -> int:
    """Look at data and a model, and write a recipe for them. Nothing is loaded, run or downloaded."""
    from assay.corpus.scores_folder import refuse_scores
    from assay.corpus.storage import Store
    from assay.recipe import load_recipe
    from assay.recipe.draft import draft_recipe

    refuse_scores(Store.at(out))
    if os.path.lexists(out):
        raise FileExistsError(f"{out}: is there already; choose another name with --out")
    draft = draft_recipe(data, model, reference, target, out)
    with open(out, "x", encoding="utf-8") as file:
        file.write(draft.text)
    try:
        loaded = load_recipe(out)
    except Exception:
        os.unlink(out)  # or the next try would find it there
        raise
    for note in draft.notes:
        say(note)
    say(f"recipe: {out}")
    print()
    say(f"assay score {shlex.quote(out)}")
    say(f"assay show {shlex.quote(os.path.relpath(loaded.output))} --by {draft.score} --worst 5 --best 5")
    return OK


def validate(
    target: Annotated[str, typer.Argument(metavar="RECIPE|SCORES", help="A recipe, or a folder of `assay score`.")],
    overrides: Overrides = None,
    trust: Trust = None,
    corpus: CorpusNow = None,
    as_json: Annotated[bool, typer.Option("--json", help="Of SCORES: every problem, as JSON.")] = False,
) -> int:
    """Check a recipe (keys, files, shards, models and methods; scores nothing), or scores against their corpus."""
    if _is_folder(target):
        if overrides or trust:
            raise ValueError(f"{target}: is a folder of scores; --set and --trust are for a recipe")
        return _validate_scores(target, corpus, as_json)
    if corpus is not None or as_json:
        raise ValueError(f"{target}: is not a folder of scores; --corpus and --json are for one")
    return _validate_recipe(target, overrides or (), trust or ())


def _is_folder(target: str) -> bool:
    from assay.corpus.storage import Store

    store = Store.at(target)
    return bool(store.fs.isdir(store.root))


def _validate_recipe(recipe: str, overrides: Sequence[str], trust: Sequence[str]) -> int:
    from assay.engine import check_recipe, next_plan
    from assay.recipe import load_recipe

    loaded = load_recipe(recipe, overrides, trust)
    columns = check_recipe(loaded)
    plan = next_plan(loaded, rescore=True)
    say(f"{recipe}: fine; {len(plan.corpus.shards)} shards, {plan.done.shards} of them done")
    for column in columns:
        say(f"  {column.name} (keep {column.keep}): {column.description}")
    return OK


def _validate_scores(scores: str, corpus: str | None, as_json: bool) -> int:
    from assay.corpus.validation import Problem, validate_scores

    log_to_stderr(quiet=False)
    problems: list[Problem] = []

    def on_problem(problem: Problem) -> None:
        if as_json or len(problems) < _LISTED_PROBLEMS:
            problems.append(problem)
            if not as_json:
                say(str(problem))

    found = validate_scores(scores, corpus, on_problem)
    if as_json:
        print(dumps({**vars(found), "problems": [vars(problem) for problem in problems]}, indent=2))
    else:
        _say_found(scores, found, len(problems))
    return fail(f"{scores}: {found.problems:,} problems", INCOMPLETE) if found.problems else OK


def _say_found(scores: str, found: Validated, listed: int) -> None:
    if found.problems > listed:
        say(f"… and {found.problems - listed:,} more (--json lists all)")
    if found.running:
        say("a run is writing into this folder: what it has not done yet counts as missing")
    rows = f"rows {found.scored + found.quarantined:,} = scored {found.scored:,} + quarantined {found.quarantined:,}"
    shards = f"{found.shards:,} shards ({found.unreadable:,} unreadable)"
    if found.unchecked:
        say(f"{found.unchecked:,} tables could not be checked: storage failed, and may answer when it is asked again")
    say(f"{scores}: {'' if found.problems else 'fine; '}{shards}, {rows}")
