"""A worker that cannot be imported, but by the process that wants to start it."""

import multiprocessing

if multiprocessing.current_process().name == "assay-worker":
    import no_such_module  # noqa: F401


def main(connection) -> None:
    raise AssertionError
