"""What one rank brings back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gan_lib.gan.models import Generator


@dataclass
class TrainingResult:
    """What one rank brings back.

    Attributes:
        rank: of this process.
        world_size: number of ranks.
        device: "cpu" or "cuda:0".
        epochs: trained in this call.
        iterations: optimiser steps in this call.
        seconds: from the first step to the last.
        images_per_second: over all ranks together.
        weights_sha256: of generator and discriminator, equal on all ranks.
        stopped: whether it was asked to stop before its last epoch.
        reason: why it ended by itself before that, in a sentence.
        note: on what too much of the time was spent, in a sentence.
        asked: for what: "epoch", "now", "regroup" (to go on with more ranks) or "retire" (without
            a worker that is to end).
        run: URL of the run directory, if one was written.
        records: one dictionary per recorded iteration (rank 0 only).
        quality: one dictionary per measured epoch, see `gan_lib.results.run.Run.quality`.
        generator: the trained generator, if this was the only rank.
    """

    rank: int
    world_size: int
    device: str
    epochs: int
    iterations: int
    seconds: float
    images_per_second: float
    weights_sha256: str
    stopped: bool
    reason: str
    note: str
    asked: str
    run: str | None
    records: list[dict[str, Any]] = field(repr=False, default_factory=list)
    quality: list[dict[str, Any]] = field(repr=False, default_factory=list)
    generator: Generator | None = field(repr=False, default=None)
