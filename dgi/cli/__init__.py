"""The command line: ``dgi train | index | search | eval | compare | bench | demo``, one file each.

A subcommand's module has ``HELP``, ``EPILOG``, ``add_arguments(parser)`` and ``run(args)``.  What takes torch is
imported in ``run`` only, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from dgi.cli import bench, compare, demo, evaluate, index, search, train

COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "index": index,
    "search": search,
    "eval": evaluate,
    "compare": compare,
    "bench": bench,
    "demo": demo,
}
USER_ERROR = 2
INTERRUPTED = 130
CLOSED_PIPE = 141  # as the shell reports a program that a closed pipe ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status: 0, or 2 after an error of the user's, told in one message."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that the terminal lacks ends no command
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if args.command == "bench":
        args.pytest_arguments = unknown
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    # Threads that spin while they wait for each other stall when another process has one of the cores: a training step
    # of the demo then took ten times as long.  OpenMP reads this when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("dgi").setLevel(logging.INFO)
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # who reads our output has seen enough, as "| head" has
        # Python flushes at exit what is left, to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    # A wrong file, value or environment, too little memory, or training that diverged; anything else is a fault of ours
    # and shows itself.
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError, RuntimeError) as error:
        message = _message(error)
        if args.debug or message is None:
            raise
        print(f"dgi {args.command}: error: {message}", file=sys.stderr)
        return USER_ERROR
    return 0


def _message(error: Exception) -> str | None:
    """What to tell the user of an error; None where it is no error of the user's."""
    if isinstance(error, (MemoryError, RuntimeError)):
        text = str(error)
        # torch has a class for GPUs only; of the CPU's allocator the words are all there is.
        if not isinstance(error, MemoryError) and "out of memory" not in text and "can't allocate memory" not in text:
            return None
        return (
            f"not enough memory ({(text or 'MemoryError').splitlines()[0]}); take fewer at once (batch size, "
            f"beams, results), or a smaller model"
        )
    return str(error)


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="dgi",
        description="Generative retrieval with Differentiable Geometric Indexing: train a model that "
        "finds items by generating their semantic IDs, index a catalog, search it, and evaluate the search.",
        epilog='"dgi demo" shows all of it on MovieLens-100K; "dgi COMMAND --help" explains a command.',
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        description = f"{module.HELP[0].upper()}{module.HELP[1:]}."
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=description,
            epilog=module.EPILOG,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run)
    return parser
