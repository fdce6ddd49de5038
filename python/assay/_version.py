"""The version, where everything that writes it into a file can read it without importing the rest."""

__version__ = "0.1.0"
