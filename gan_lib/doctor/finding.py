"""What a check says."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

OK, WARNING, FAULT, NOT_CHECKED = "ok", "warning", "fault", "not checked"


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    Attributes:
        verdict: "ok"; "warning" of what works badly; "fault" of what does not work; or
            "not checked".
        found: in a few words, with the place and the value; or why it was not checked.
        cure: what to do about it.
    """

    verdict: str
    found: str
    cure: str = ""


def ok(found: str) -> Finding:
    """Nothing is wrong."""
    return Finding(OK, found)


def not_checked(why: str) -> Finding:
    """Not needed here, or not possible."""
    return Finding(NOT_CHECKED, why)


def judge(faults: Collection[str], warnings: Collection[str], well: str, cure: str) -> Finding:
    """A fault if there is any, or else a warning, or else what is well."""
    if faults:
        return Finding(FAULT, "; ".join([*faults, *warnings]), cure)
    return Finding(WARNING, "; ".join(warnings), cure) if warnings else ok(well)


def name_some(names: Collection[str], most: int = 3) -> str:
    """Names in one line: the first of them, and how many more there are."""
    first = ", ".join(sorted(names)[:most])
    return first + (f" and {len(names) - most} more" if len(names) > most else "")
