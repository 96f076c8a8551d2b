"""quality.jsonl: how good a run's pictures were after each epoch that was measured.

One line for each epoch and feature network; an epoch that is measured again replaces its line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from gan_lib.base.checks import check_type
from gan_lib.base.seeds import SAMPLES, stream_seed
from gan_lib.base.storage import Folder
from gan_lib.quality.features import EfficientNetLite0
from gan_lib.quality.scores import Reference
from gan_lib.results.files import QUALITY, SCORES

Line = dict[str, Any]


def quality_seed(seed: int) -> int:
    """Of the images that are measured: from the same latent vectors after every epoch of a run."""
    return stream_seed(seed, SAMPLES, 1)


def quality_line(
    epoch: int, iteration: int, n_real: int, features: Tensor, real: Reference, network: str
) -> Line:
    """What is kept of one measurement.

    Args:
        epoch: after which the images were generated.
        iteration: the same.
        n_real: images that an epoch sees.
        features: of the generated images.
        real: with what they are compared.
        network: whose features they are.
    """
    scores = real.scores(features)
    floor = {f"{name}_floor": real.floor[name] for name in SCORES}
    return {
        "epoch": epoch,
        "iteration": iteration,
        "images_seen": epoch * n_real,
        **{name: round(value, 6) for name, value in (scores | floor).items()},
        "images": len(features),
        "network": network,
        "time": round(time.time(), 3),
    }


def read_quality(folder: Folder) -> list[Line]:
    """All lines, in the order of epochs.

    Raises:
        ValueError: if one is not as it was written.
    """
    try:
        data = folder.read(QUALITY)
    except FileNotFoundError:
        return []
    return [_checked(line) for line in data.decode().splitlines()]


def keep_quality(folder: Folder, new: Iterable[Line], until: int | None = None) -> None:
    """Add lines to those in a run directory; those of epochs after `until` are deleted."""
    old = read_quality(folder)
    lines = {(line["epoch"], line["network"]): line for line in (*old, *new)}
    kept = [lines[key] for key in sorted(lines) if until is None or key[0] <= until]
    if kept != old:
        folder.write(QUALITY, "".join(json.dumps(line) + "\n" for line in kept).encode())


def of_network(lines: Sequence[Line], network: str = "") -> list[Line]:
    """Those of one network, since others cannot be compared: the default one, or the only one."""
    names = [line["network"] for line in lines]
    default = EfficientNetLite0.name
    wanted = network or (default if default in names or not names else names[-1])
    return [line for line in lines if line["network"] == wanted]


def best_line(lines: Sequence[Line], kept: Iterable[int]) -> Line | None:
    """The line with the least KID of those whose epoch has a checkpoint; None if none has."""
    found = [line for line in of_network(lines) if line["epoch"] in set(kept)]
    return min(found, key=lambda line: line["kid"], default=None)


def best_epoch(lines: Sequence[Line], kept: Iterable[int]) -> int | None:
    """The epoch of `best_line`."""
    best = best_line(lines, kept)
    return best["epoch"] if best else None


def no_longer_better(lines: Sequence[Line], patience: int) -> str:
    """Why a training may end, in a sentence; empty while it should go on.

    A measurement counts as a gain if its KID is below the last gain's by more than that one's
    spread; a slow gain is one, too, as soon as it has added up to so much.
    """
    best: Line | None = None
    waited = 0
    for line in lines:
        if best is None or line["kid"] < best["kid"] - best["kid_spread"]:
            best, waited = line, 0
        else:
            waited += 1
    if best is None or not patience or waited < patience:
        return ""
    return (
        f"in {waited} measurements KID has not fallen below that of epoch {best['epoch']}, "
        f"{best['kid']:.4f}, by more than its spread of {best['kid_spread']:.4f} (patience "
        f"{patience}; features of {best['network']})"
    )


def _checked(text: str) -> Line:
    line = check_type("a line", dict, json.loads(text))
    numbers = ("epoch", "iteration", "images_seen", "images", "kid_spread", *SCORES)
    for name in (*numbers, *(f"{score}_floor" for score in SCORES)):
        if not isinstance(line.get(name), int | float):
            raise ValueError(f"{name} is {line.get(name)!r}, expected a number")
    check_type("network", str, line.get("network"))
    return line
