"""Demonstrations on real data that any machine has: ``assay demo digits``, ``assay demo text``."""
