"""What is read in the files of a run, checked: anybody may have written them.

What is not as it should be raises; what this version of gan_lib does not know is passed over.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from gan_lib.base.checks import check_type, require_range
from gan_lib.parameters import TrainingParameters
from gan_lib.results.files import LOSSES

# A run that trains says so every 15 s; one that waits for workers says nothing for longer.
SECONDS_WITHOUT_A_SIGN = 120.0


@dataclass(frozen=True)
class RunStatus:
    """What a run was last heard to do.

    Attributes:
        state: "waiting", "training"; or how it ended: "finished", "failed", "stopped" with a
            checkpoint of where it was, or "interrupted" without.
        time: when it said so, in seconds since 1970.
        error: what ended it, if it failed.
        job: the attempt that may write into it.
        restarts: why it was started again, a sentence for each time.
        reason: why it ended by itself before its last epoch.
        note: on what it spent too much of its time, if it did.
    """

    state: str = "waiting"
    time: float = 0.0
    error: str = ""
    job: str = ""
    restarts: tuple[str, ...] = ()
    reason: str = ""
    note: str = ""


def read_info(data: bytes) -> dict[str, Any]:
    """The content of parameters.json."""
    info = check_type("it", dict, json.loads(data))
    told = check_type("parameters", dict, info.get("parameters"))
    known = {name: told[name] for name in TrainingParameters.names() if name in told}
    for name in {"images", "steps_per_epoch", "world_size"} & info.keys():
        require_range(name, check_type(name, int, info[name]), 1, None)
    return info | {"parameters": told | TrainingParameters(**known).to_dict()}


def read_status(data: bytes) -> RunStatus:
    """The content of status.json."""
    told = check_type("it", dict, json.loads(data))
    told["restarts"] = tuple(map(str, told.get("restarts", ())))
    known: dict[str, Any] = {
        field.name: check_type(field.name, type(field.default), told[field.name])
        for field in fields(RunStatus)
        if field.name in told
    }
    return RunStatus(**known)


def read_record(line: str) -> dict[str, Any]:
    """A line of records."""
    record = check_type("a line", dict, json.loads(line))
    for name in ("iteration", "epoch", *LOSSES, "images_per_second", "time"):
        if not isinstance(record.get(name), int | float):
            raise ValueError(f"{name} is {record.get(name)!r}, expected a number")
    return record
