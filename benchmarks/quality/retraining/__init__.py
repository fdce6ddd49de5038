"""Experiments of methods that train models to know, each with its controls."""
