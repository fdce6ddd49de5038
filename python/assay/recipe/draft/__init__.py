"""A first recipe for somebody's data and model, from what the columns and the model's config say."""

from assay.recipe.draft.draft import Draft, draft_recipe

__all__ = ["Draft", "draft_recipe"]
