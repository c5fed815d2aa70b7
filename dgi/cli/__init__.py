"""The command line: ``dgi train | index | search | eval | bench | demo``, one file each.

A subcommand's module has ``HELP``, ``EPILOG``, ``add_arguments(parser)`` and ``run(args)``.  What takes torch is
imported in ``run`` only, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from types import ModuleType

from dgi.cli import bench, demo, evaluate, index, search, train

COMMANDS: dict[str, ModuleType] = {
    "train": train, "index": index, "search": search, "eval": evaluate, "bench": bench, "demo": demo,
}
USER_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status: 0, or 2 after an error of the user's, told in one message."""
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if args.command == "bench":
        args.pytest_arguments = unknown
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("dgi").setLevel(logging.INFO)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    # A wrong file, value or environment, or training that diverged; anything else is a fault of ours and shows itself.
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if args.debug:
            raise
        print(f"dgi {args.command}: error: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="dgi", description="Generative retrieval with Differentiable Geometric Indexing: train a model that "
        "finds items by generating their semantic IDs, index a catalog, search it, and evaluate the search.",
        epilog='"dgi demo" shows all of it on MovieLens-100K; "dgi COMMAND --help" explains a command.')
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        description = f"{module.HELP[0].upper()}{module.HELP[1:]}."
        command = commands.add_parser(name, help=module.HELP, description=description, epilog=module.EPILOG,
                                      allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=module.run)
    return parser
