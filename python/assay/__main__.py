"""`python -m assay`, and what the console script calls."""

import sys


def main() -> int:
    """Run the command line; without its extra, say what to install."""
    try:
        from assay.cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("assay", "torch"):
            raise
        print(f"assay: the command needs {error.name}; it comes with `pip install 'assay[cli]'`", file=sys.stderr)
        return 2
    return run()


if __name__ == "__main__":
    sys.exit(main())
