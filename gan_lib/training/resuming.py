"""Whose a run is, what it may be told anew, and from where it goes on."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from gan_lib.base.errors import RunError
from gan_lib.data.image_set import ImageSet
from gan_lib.parameters import TrainingParameters
from gan_lib.results.checkpoints import Checkpoints, Position
from gan_lib.results.files import PARAMETERS, QUALITY, STATUS, epoch_path
from gan_lib.results.quality import keep_quality, no_longer_better
from gan_lib.results.run import open_run
from gan_lib.results.writing import OwnWriter, RunWriter, create_run

# What a resumed run may be told anew; all else decides what its weights become.
MAY_CHANGE = (
    "epochs", "record_every", "sample_every", "checkpoint_every", "keep_checkpoints", "keep_every",
    "quality_every", "quality_images", "patience",
)  # fmt: skip


def claim_run(
    run: str,
    parameters: TrainingParameters,
    images: ImageSet,
    resume: bool,
    new_images: bool,
    attempt: str,
) -> None:
    """Make sure that `run` is new, or reserved for this attempt of a job, or one to resume.

    Raises:
        RunError: if it is taken, or `resume` finds no run, or one of other parameters, or (but
            for `new_images`) one of other images.
    """
    if resume:
        refuse_differences(run, open_run(run).parameters, parameters)
        if not new_images:
            refuse_other_images(run, images)
        # A job that was interrupted while it ended by itself only has to end.
        if not attempt:
            refuse_impatience(run, parameters)
        return
    reserved = bool(attempt) and RunWriter(run).exists(PARAMETERS)
    if not reserved or open_run(run).status().job != attempt:
        create_run(run, parameters)


def refuse_differences(run: str, old: TrainingParameters, new: TrainingParameters) -> None:
    """Raise RunError, naming each parameter that a resumed run may not be told anew.

    It may not be told to end before the place that it has reached, either.
    """
    was, now = old.to_dict(), new.to_dict()
    differences = [
        f"{name} was {was[name]!r} and is {now[name]!r}"
        for name in was
        if was[name] != now[name] and name not in (*MAY_CHANGE, "device")
    ]
    if differences:
        raise RunError(
            f"{run} cannot be resumed with other parameters: {'; '.join(differences)}. "
            f"Only {', '.join(MAY_CHANGE)} may change"
        )
    reached = open_run(run).positions()[-1:]
    if reached > [Position(new.epochs)]:
        raise RunError(
            f"epochs is {new.epochs}, and the newest checkpoint of {run} is {reached[0]}: "
            "epochs counts from the start of the run, so give a larger number"
        )


def refuse_other_images(run: str, images: ImageSet) -> None:
    """Raise RunError if a run was trained on other images than those with which it is to go on."""
    info = open_run(run).info()
    then = info.get("images_sha256", "")
    # Of a torch Dataset nothing but the number is known before its images are read.
    known = isinstance(images.pixels, np.ndarray)
    if then and (then != images.checksum() if known else info["images"] != len(images)):
        raise RunError(
            f"{run} was trained on {info['images']:,} images, and the {len(images):,} that are now "
            f"in {images.source or 'its source'} are not the same: bring the old ones back, or "
            "go on with these by new_images=True"
        )


def refuse_impatience(run: str, parameters: TrainingParameters) -> None:
    """Raise RunError if a run would end at once, because it no longer gets better."""
    said = no_longer_better(open_run(run).quality(), parameters.patience)
    if said:
        raise RunError(f"{run} is not worth going on with: {said}. Give more patience, or 0")


def take_up(
    writer: OwnWriter, checkpoints: Checkpoints, start_over: bool
) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """The newest whole checkpoint, from which the run goes on; what came later is deleted.

    So is what a killed rank has half written. `start_over` begins anew where every checkpoint
    is damaged.

    Returns:
        The checkpoint's content (empty if there is none), the records of the epoch that
        it is inside of, and what was wrong with newer checkpoints.

    Raises:
        RunError: if every checkpoint is damaged, or another job goes on with the run.
    """
    position, state, damaged = checkpoints.newest()
    if position is None:
        if damaged and not start_over:
            raise RunError(
                f"all checkpoints in {writer.url} are damaged, the newest: {damaged[0]}. "
                "Launch a new run"
            )
        position = Position(0)
    writer.check()
    # All that ranks write, but not `stop`: somebody may be asking for it just now. A rank of
    # an earlier attempt that still lives then fails to put its file in place, as it should.
    writer.remove_unfinished(PARAMETERS, STATUS, QUALITY, "*/*")
    keep_quality(writer, [], until=position.epochs)
    run = open_run(writer.url)
    records: list[dict[str, Any]] = []
    if position.within and position.epochs + 1 in run.epochs("records"):
        known = run.plain_records([position.epochs + 1])
        records = [record for record in known if record["iteration"] <= state["iteration"]]
    # An iteration is recorded once: what follows the checkpoint is trained again.
    for kind in ("records", "samples", "tensorboard"):
        for epoch in run.epochs(kind):
            if records and kind == "records" and epoch == position.epochs + 1:
                writer.submit_result(epoch_path(kind, epoch), record_lines(records))
            elif epoch > position.epochs:
                writer.remove(epoch_path(kind, epoch))
    for later in checkpoints.positions():
        if later > position:
            checkpoints.remove(later)
    return state, records, damaged


def record_lines(records: list[dict[str, Any]]) -> str:
    """The content of a file of records."""
    return "".join(json.dumps(record) + "\n" for record in records)
