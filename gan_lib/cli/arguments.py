"""What several commands are told in the same words."""

from __future__ import annotations

import argparse


def add_run(parser: argparse.ArgumentParser) -> None:
    """Give a command the run that it is about."""
    parser.add_argument("run", help="run directory or URL, or latest")


def add_profile(parser: argparse.ArgumentParser) -> None:
    """Give a command `--profile NAME` and `-p NAME VALUE`."""
    parser.add_argument("--profile", default="quick", help="a name in profiles/, or a YAML file")
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
        help="a parameter, stronger than the profile; may be given again",
    )


def add_example(parser: argparse.ArgumentParser, line: str) -> None:
    """End the help of a command with a line that can be copied."""
    parser.epilog = f"Example: python -m gan_lib {line}"
