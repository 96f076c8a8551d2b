"""What lies where in a run directory, here or in an object store.

    parameters.json              what it was told; versions, world size, device
    status.json                  what it is doing, or how it ended
    records/epoch_0107.jsonl     one line per recorded iteration
    samples/epoch_0107.png       the same latent vectors every time
    checkpoints/epoch_0107.pt    after epoch 107: all that is needed to go on exactly
    checkpoints/within_0108.pt   inside epoch 108, where somebody stopped at once
    quality.jsonl                how good its pictures were, by epoch
    stop                         somebody asks the run to end
    regroup                      its supervisor asks it to go on with more workers
    tensorboard/                 the same records for TensorBoard

Every file is written whole and put in place at once, so a reader never sees
half of one, and an epoch that is trained again replaces its own records.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from gan_lib.base.checkout import CHECKOUT, IS_ONE

# A checkout keeps its runs together, wherever a notebook was started from.
RUNS = str((CHECKOUT if IS_ONE else Path.cwd()) / "runs")

PARAMETERS, STATUS, QUALITY = "parameters.json", "status.json", "quality.jsonl"
STOP, REGROUP = "stop", "regroup"
# The kinds of files that come once per epoch.
_PER_EPOCH = {
    "records": "records/epoch_{:04d}.jsonl",
    "samples": "samples/epoch_{:04d}.png",
    "checkpoints": "checkpoints/epoch_{:04d}.pt",
    "within": "checkpoints/within_{:04d}.pt",
    "tensorboard": "tensorboard/events.out.tfevents.epoch_{:04d}",
}

LOSSES = ("loss_d_real", "loss_d_fake", "loss_d", "loss_g")
SCORES = ("kid", "fd", "precision", "recall")


def epoch_path(kind: str, epoch: int) -> str:
    """Path of an epoch's file below the run directory."""
    return _PER_EPOCH[kind].format(epoch)


def epochs_of(kind: str, names: Iterable[str]) -> list[int]:
    """The epochs that have a file of this kind among these names of its folder, in order."""
    before, after = map(re.escape, _PER_EPOCH[kind].rpartition("/")[2].split("{:04d}"))
    found = (re.fullmatch(rf"{before}(\d+){after}", name) for name in names)
    return sorted(int(match[1]) for match in found if match)
