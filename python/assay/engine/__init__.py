"""Recipes, and running their methods over a corpus."""
