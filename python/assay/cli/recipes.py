"""`assay validate`."""

from __future__ import annotations

from assay.cli.terminal import OK, Overrides, RecipeFile, Trust, say


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
