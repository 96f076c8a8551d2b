"""Where the files lie that are beside the package in a checkout: notebooks, profiles, runs."""

from __future__ import annotations

from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
IS_ONE = (CHECKOUT / "pyproject.toml").exists()
