"""The command `assay`: a thin shell over the functions that Python users call.

Exit codes: 0 success; 1 it ran, but something was quarantined or unreadable; 2 bad usage, recipe or input.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import assay

if TYPE_CHECKING:
    from assay.corpus.scores_folder import Scores
    from assay.engine.progress import Progress
    from assay.recipe.recipe import Recipe

OK, INCOMPLETE, BAD, INTERRUPTED = 0, 1, 2, 130
_LISTED_SHARDS = 50
_OPTIONAL = ("numpy", "pyarrow", "pydantic", "fsspec", "zstandard", "scikit-learn", "transformers", "gguf")

app = typer.Typer(
    help="Which of this data is worth training on?",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
demo = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(demo, name="demo")

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe in YAML.")]
ScoresFolder = Annotated[str, typer.Argument(metavar="SCORES", help="A folder that `assay score` wrote.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of the recipe: batch.tokens=4096"),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code. Errors are one line, or a traceback with ASSAY_DEBUG=1."""
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="assay", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if os.environ.get("ASSAY_DEBUG") == "1":
            raise
        return _fail(_describe(error), BAD)
    if code == INTERRUPTED:  # some versions of typer turn the interrupt into this code themselves
        return _fail("interrupted; run the same command again to go on where it stopped", INTERRUPTED)
    return code if isinstance(code, int) else OK


def _describe(error: Exception) -> str:
    usage = getattr(error, "format_message", None)  # click's errors, wherever typer takes click from
    if usage is not None:
        return f"{usage()} (see `assay --help`)"
    text = str(error)
    if isinstance(error, ValueError | ImportError):
        return text
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else text
    return f"internal error: {type(error).__name__}: {text}; ASSAY_DEBUG=1 shows where"


def _fail(message: str, code: int) -> int:
    print(f"assay: {_clean(message)}", file=sys.stderr)
    return code


def _say(line: str) -> None:
    """A line for standard output: what data, recipes or files of other makers put into it stays one line."""
    print(_clean(line))


def _clean(text: str) -> str:
    """Text that may come from data, on one line and without control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split("\n")))


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _clean(super().format(record))


def _log_to_stderr(quiet: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger("assay")
    log.handlers = [handler]
    log.setLevel(logging.ERROR if quiet else logging.INFO)
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries that load models


def _version(asked: bool) -> None:
    if asked:
        print(f"assay {assay.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    _help_without_command(context)


@demo.callback(help="Demonstrations on real data.")
def _demo_options(context: typer.Context) -> None:
    _help_without_command(context)


def _help_without_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def score(
    recipe: RecipeFile,
    overrides: Overrides = None,
    rescore: Annotated[
        bool, typer.Option("--rescore", help="Replace tables that another recipe or model made.")
    ] = False,
    shard: Annotated[
        str,
        typer.Option("--shard", metavar="I/N", help="Take every N-th shard from the I-th on, I from 1 to N."),
    ] = "1/1",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and the recipe.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between progress lines off a terminal.")] = 10.0,
) -> int:
    """Score a corpus: one table per shard. Running it again does only what is missing."""
    _log_to_stderr(quiet)
    _limit_threads()
    from assay.corpus.layout import table_path
    from assay.engine import make_plan, run

    part = _part(shard)
    loaded = _load(recipe, overrides)
    if dry_run:
        plan = make_plan(loaded, part, rescore)
        _say(f"{len(plan.todo)} shards to score ({len(plan.stale)} of them again), {plan.done.shards} done")
        for todo in plan.todo:
            _say(f"  {todo.path} -> {plan.output.full(table_path(todo))}")
        print(loaded.to_yaml(), end="")
        return OK
    summary = run(loaded, part=part, rescore=rescore, progress=_progress(quiet, interval))
    if not quiet:
        for line in summary.lines():
            _say(line)
        for key, text in sorted(summary.warnings.items()):
            _say(f"{key}: {text}")
        _say(f"scores: {loaded.output}")
    if not summary.clean:
        _fail(f"not everything was scored; see {loaded.output}/quarantine", INCOMPLETE)
    return OK if summary.clean else INCOMPLETE


def _load(recipe: str, overrides: Sequence[str] | None) -> Recipe:
    from assay.recipe.recipe import load_recipe

    return load_recipe(recipe, overrides or ())


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--shard {text}: expected I/N with 1 ≤ I ≤ N, such as 1/8")
    return int(match[1]), int(match[2])


def _progress(quiet: bool, interval: float) -> Progress:
    from assay.engine.progress import BarProgress, LogProgress, Progress

    if quiet:
        return Progress()
    return BarProgress() if sys.stderr.isatty() else LogProgress(interval)


def _limit_threads() -> None:
    threads = os.environ.get("ASSAY_NUM_THREADS")
    if threads:
        import torch

        if not threads.isdecimal() or int(threads) < 1:
            raise ValueError(f"ASSAY_NUM_THREADS={threads}: expected a positive number")
        torch.set_num_threads(int(threads))


@app.command()
def validate(recipe: RecipeFile, overrides: Overrides = None) -> int:
    """Check a recipe: keys, files, shards, models and methods. Scores nothing."""
    from assay.engine import make_plan, open_workshop

    loaded = _load(recipe, overrides)
    plan = make_plan(loaded, rescore=True)
    workshop = open_workshop(plan, fit=False)
    _say(f"{recipe}: fine; {len(plan.corpus.shards)} shards, {plan.done.shards} of them done")
    for column in workshop.columns:
        _say(f"  {column.name} (keep {column.keep}): {column.description}")
    return OK


@app.command()
def select(
    scores: ScoresFolder,
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where the curated corpus goes.")],
    by: Annotated[str | None, typer.Option("--by", metavar="SCORE", help="The score to judge by.")] = None,
    top: Annotated[
        str | None,
        typer.Option(metavar="AMOUNT", help="The best: 1000 are rows, 0.5 is a share, 1.0 is all."),
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="This score or better.")] = None,
    quantile: Annotated[
        float | None, typer.Option(help="From this quantile of worth on: 0.9 is the best tenth.")
    ] = None,
    gmm: Annotated[bool, typer.Option("--gmm", help="The better of two Gaussians.")] = False,
    kmeans: Annotated[bool, typer.Option("--kmeans", help="The better of two groups of least squared error.")] = False,
    sample: Annotated[str | None, typer.Option(metavar="AMOUNT", help="Draw in proportion to the score.")] = None,
    random: Annotated[str | None, typer.Option(metavar="AMOUNT", help="Draw uniformly: the control.")] = None,
    keep: Annotated[
        str | None, typer.Option(metavar="high|low", help="Which end is better, if not as the table says.")
    ] = None,
    seed: Annotated[int, typer.Option(help="For --sample, --random and --gmm.")] = 0,
    temperature: Annotated[float | None, typer.Option(help="For --sample: softmax(worth / temperature).")] = None,
    corpus: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where the corpus is now, if it has moved.")
    ] = None,
) -> int:
    """Write the part of the corpus that is worth keeping, with a manifest and a reason per row."""
    from assay.curate import RuleOptions, curate

    options = RuleOptions(
        top,
        threshold,
        quantile,
        gmm,
        kmeans,
        sample,
        random,
        by=by,
        keep=keep,
        seed=seed,
        temperature=temperature,
    )
    curated = curate(scores, by, options.rule(), out, corpus)
    dropped = curated.rows - curated.kept - curated.quarantined
    _say(curated.selection.summary())
    print(
        f"rows in {curated.rows:,} = kept {curated.kept:,} + dropped {dropped:,} + quarantined {curated.quarantined:,}"
    )
    _say(f"corpus: {out}")
    return _fail(curated.missing, INCOMPLETE) if curated.missing else OK


@app.command("ls")
def list_scores(
    scores: ScoresFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Every shard, as JSON.")] = False,
    corpus: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where the corpus is now, if it has moved.")
    ] = None,
) -> int:
    """List the shards: which are done, which have changed since, how many rows each has."""
    from assay.corpus.scores_folder import open_scores

    found = open_scores(scores, corpus)
    lines = _shard_lines(found)
    if as_json:
        print(json.dumps(lines, indent=2))
        return OK
    from rich.console import Console
    from rich.table import Table

    table = Table("shard", "state", "rows", "scored", "quarantined", box=None)
    for line in lines[:_LISTED_SHARDS]:
        table.add_row(*(_clean("" if value is None else str(value)) for value in line.values()))
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False, highlight=False)
    console.print(table)
    if len(lines) > _LISTED_SHARDS:
        console.print(f"… and {len(lines) - _LISTED_SHARDS} more (--json lists all)")
    states = Counter(line["state"] for line in lines)
    console.print(f"{len(lines)} shards: " + ", ".join(f"{count} {state}" for state, count in states.items()))
    console.print(_clean(f"scores: {', '.join(found.columns)}"))
    return OK


def _shard_lines(scores: Scores) -> list[dict[str, Any]]:
    lines = []
    for status in scores.shards:
        table = status.table
        lines.append(
            {
                "shard": status.shard.path,
                "state": status.state.value,
                "rows": table.input.rows if table else None,
                "scored": table.rows.scored if table else None,
                "quarantined": table.rows.quarantined if table else None,
            }
        )
    return lines


@app.command()
def doctor() -> int:
    """Print what is installed, which kernels were built and which of them this processor runs."""
    import platform

    import torch

    lines = {
        "assay": assay.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "cuda": torch.version.cuda or "torch is built without it",
    }
    try:
        lines |= {key: str(value) for key, value in assay.ops.build_info().items()}
        code = OK
    except (ImportError, AttributeError, OSError) as error:
        lines["native"] = f"not available: {error}"
        code = INCOMPLETE
    lines |= {package: _installed(package) for package in _OPTIONAL}
    for key, value in lines.items():
        _say(f"{key:18} {value}")
    return code


def _installed(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@demo.command("digits")
def demo_digits(
    out: Annotated[Path, typer.Option(help="Where its files go.")] = Path("demo/digits"),
    seeds: Annotated[int, typer.Option(help="Repetitions.")] = 3,
) -> int:
    """Digits with wrong labels: score, select, train; curated against random and against everything."""
    from assay.demo import digits

    _log_to_stderr(quiet=False)
    digits.main(out, seeds)
    return OK


@demo.command("text")
def demo_text(
    out: Annotated[Path, typer.Option(help="Where its files go.")] = Path("demo/text"),
) -> int:
    """Text with planted junk, scored by a small language model."""
    from assay.demo import text

    _log_to_stderr(quiet=False)
    text.main(out)
    return OK
