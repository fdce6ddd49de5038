"""The command that keeps what the page counts, fit to be pasted into a shell."""

from __future__ import annotations

import os
import shlex

OUT = "curated"


def select_command(scores: str, corpus: str | None, where: str, out: str = OUT) -> str:
    """`assay select` for this condition, from whatever folder it is called.

    ValueError for a name with a NUL in it, which no command line can hold.
    """
    words = ["assay", "select", _absolute(scores)]
    words += [] if corpus is None else ["--corpus", _absolute(corpus)]
    words += ["--where", where, "--out", out]
    if any("\0" in word for word in words):
        raise ValueError("A score's name has the character NUL in it, and no command line can hold that.")
    return " ".join(map(quoted, words))


def quoted(word: str) -> str:
    """A word as a shell takes it. Characters that would act on the terminal, or show the line other than it is, are
    written by their bytes, as bash, zsh, ksh and POSIX 2024 read them: $'\\x1b'."""
    if word.isprintable():
        return shlex.quote(word)
    return "$'" + "".join(_escaped(c) for c in word) + "'"


def _escaped(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    # Three digits each: in octal a following digit cannot be taken for one more.
    return "".join(f"\\{byte:03o}" for byte in os.fsencode(character))


def _absolute(path: str) -> str:
    return path if "://" in path or "::" in path else os.path.abspath(path)
