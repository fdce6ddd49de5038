"""`python -m assay`, and what the console script calls."""

import os
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
    # `-m` puts the current folder before everything: a yaml.py that lies beside a corpus would run as PyYAML.
    if sys.path and sys.path[0] == os.getcwd():
        sys.path.append(sys.path.pop(0))
    sys.exit(main())
