"""`assay init` and `assay validate`."""

from __future__ import annotations

import os
import shlex
from typing import Annotated

import typer

from assay.cli.terminal import OK, Overrides, RecipeFile, Trust, say


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
    from assay.recipe import load_recipe
    from assay.recipe.draft import draft_recipe

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


def validate(recipe: RecipeFile, overrides: Overrides = None, trust: Trust = None) -> int:
    """Check a recipe: keys, files, shards, models and methods. Scores nothing."""
    from assay.engine import make_plan, open_workshop
    from assay.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or (), trust or ())
    plan = make_plan(loaded, rescore=True)
    workshop = open_workshop(plan, fit=False)
    say(f"{recipe}: fine; {len(plan.corpus.shards)} shards, {plan.done.shards} of them done")
    for column in workshop.columns:
        say(f"  {column.name} (keep {column.keep}): {column.description}")
    return OK
