"""What several commands are told in the same words."""

from __future__ import annotations

import argparse

EXAMPLE = "Example: python -m gan_lib"
PROFILE_HELP = "a name in profiles/, or a YAML file"


class _Help(argparse.HelpFormatter):
    """Leaves an example in one line, however long it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith(EXAMPLE) else super()._fill_text(text, width, indent)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Give a command the run that it is about."""
    parser.add_argument("run", help="run directory or URL, or latest")


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Give a command `--profile NAME` and `-p NAME VALUE`."""
    parser.add_argument("--profile", default="quick", help=f"{PROFILE_HELP}; default: quick")
    add_parameters(parser)


def add_parameters(parser: argparse.ArgumentParser) -> None:
    """Give a command `-p NAME VALUE`."""
    parser.add_argument(
        "-p",
        "--parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter (`run --parameters` lists them); may be given again",
    )


def read_epoch(text: str) -> int | str:
    """A number, best or last, as `Run.checkpoint` takes it."""
    return int(text) if text.isdecimal() else {"last": "latest"}.get(text, text)


def add_example(parser: argparse.ArgumentParser, line: str) -> None:
    """End the help of a command with a line that can be copied."""
    parser.epilog, parser.formatter_class = f"{EXAMPLE} {line}", _Help
