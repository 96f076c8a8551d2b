"""What may be wrong with the places that are read and written."""

from __future__ import annotations

import tempfile
import time
import warnings
from email.utils import parsedate_to_datetime
from typing import Any

import fsspec

from gan_lib.base.addresses import prepared_cache
from gan_lib.base.errors import RunError, SourceError
from gan_lib.cluster.reach import failures, require_shared
from gan_lib.data.checking import check_source
from gan_lib.doctor.finding import Finding, judge, not_checked, ok
from gan_lib.doctor.patient import Patient
from gan_lib.sources.source import find_source

# S3 refuses a request that is signed by a clock that is 15 minutes off.
SECONDS_REFUSED, SECONDS_ODD = 900.0, 60.0


def run_directory(patient: Patient) -> Finding:
    """The run's place is free, and this process and each worker write and read it."""
    from gan_lib.results.writing import refuse_taken

    require_shared(
        patient.opened(),
        patient.place,
        "",
        lambda why: RunError(
            f"{patient.place} cannot be used {why}. Give a place that workers and client share "
            "and may write to: `-p run s3://bucket/run`"
        ),
    )
    if patient.run:
        refuse_taken(patient.place)
    return ok(f"{patient.place} is written and read by all")


def shared_cache(patient: Patient) -> Finding:
    """Images are prepared once, where all workers read them."""
    if not patient.has_files:
        return not_checked("the images come in a package")
    try:
        require_shared(patient.opened(), prepared_cache(), "", SourceError)
    except SourceError as error:
        cure = (
            "name a place that all workers reach, such as s3://bucket/cache, in the environment "
            "variable GAN_LIB_CACHE; as it is, each machine prepares the images for itself"
        )
        return judge([], [f"{prepared_cache()} is not shared: {error}"], "", cure)
    return ok(f"{prepared_cache()} is written and read by all")


def source(patient: Patient) -> Finding:
    """The source lists, its first image decodes, and each worker reaches it."""
    from gan_lib.data.images import prepare_images

    p = patient.parameters
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told: dict[str, Any] = {"max_images": 1, "progress": False, "cache": folder}
        prepare_images(p.source, p.image_size, p.channels, p.crop, **told)
    if patient.client is not None:
        for worker, why in failures(patient.client, check_source, p.source).items():
            raise SourceError(f"the worker {worker} cannot read the images: {why}")
    return ok(f"{p.source}: it lists, and an image of it decodes")


def clock(patient: Patient) -> Finding:
    """The clocks agree with that of the store."""
    read = [find_source(patient.parameters.source).url] if patient.has_files else []
    urls = [*patient.written(), *read]
    url = next((url for url in urls if url.startswith(("s3://", "s3a://"))), "")
    if not url:
        return not_checked("nothing is in S3")
    found = {"this machine": _seconds_ahead(url)}
    if patient.client is not None:
        asked = patient.on_workers(_seconds_ahead, url)
        found |= {f"the worker {worker}": off for worker, off in asked.items()}
    known = {where: off for where, off in found.items() if off is not None}
    if not known:
        return not_checked("the store tells no time without keys")
    odd = {where: off for where, off in known.items() if abs(off) > SECONDS_ODD}
    lines = [
        f"{where} is {abs(off):.0f} s {'ahead of' if off > 0 else 'behind'} the store's clock"
        for where, off in odd.items()
    ]
    cure = "set the clock (`timedatectl set-ntp true`): S3 refuses requests that are 15 minutes off"
    refused = any(abs(off) > SECONDS_REFUSED for off in odd.values())
    most = max(map(abs, known.values()))
    well = f"within {most:.0f} s of the store's"
    return judge(lines, [], well, cure) if refused else judge([], lines, well, cure)


def _seconds_ahead(url: str) -> float | None:
    """How far this clock is ahead of a store's, by the Date of an answer, whatever else it says.

    None if there is no answer: why is another check's to say.
    """
    fs, path = fsspec.core.url_to_fs(url)
    began = time.time()
    try:
        answer = fs.call_s3("head_bucket", Bucket=fs.split_path(path)[0])
    except Exception as error:
        answer = getattr(error.__cause__, "response", None)
    if answer is None:
        return None
    date = answer["ResponseMetadata"]["HTTPHeaders"]["date"]
    return (began + time.time()) / 2 - parsedate_to_datetime(date).timestamp()
