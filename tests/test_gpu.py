"""What a GPU has to do; all of it that can be tried without one is tried on the CPU too."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gan_lib.base.checkout import CHECKOUT
from gan_lib.base.errors import ParameterError
from gan_lib.cluster.starting import close_cluster, start_cluster
from gan_lib.data import batches
from gan_lib.data.batches import Batches
from gan_lib.data.image_set import ImageSet
from gan_lib.jobs.launching import launch, run_ranks
from gan_lib.parameters import TrainingParameters
from gan_lib.results.run import open_run
from gan_lib.training.rank import train_gan
from gan_lib.training.ranks import check_machine


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def on(request: pytest.FixtureRequest, tiny: TrainingParameters) -> TrainingParameters:
    """A training of seconds on each device, in the precision that is its fastest."""
    return tiny.replace(device=request.param, precision="auto")


def test_resume_is_bit_identical_on_each_device(tmp_path: Path, on: TrainingParameters) -> None:
    whole = train_gan(on)
    train_gan(on.replace(epochs=2), run=str(tmp_path / "half"))
    rest = train_gan(on, run=str(tmp_path / "half"), resume=True)
    assert rest.weights_sha256 == whole.weights_sha256
    assert rest.device.startswith(on.device)
    for record in rest.records:
        assert (record.get("device_memory_gb", 0) > 0) == (on.device == "cuda")


def test_a_run_goes_on_on_another_device(tmp_path: Path, on: TrainingParameters) -> None:
    place = str(tmp_path / "run")
    train_gan(on.replace(epochs=2), run=place)
    assert train_gan(on.replace(device="cpu"), run=place, resume=True).iterations == 6


@pytest.mark.parametrize("resident", [True, False])
def test_batches_are_the_same_on_each_device(
    on: TrainingParameters, silhouettes: ImageSet, resident: bool
) -> None:
    there = Batches(silhouettes, on, device=on.device, resident=resident)
    here = Batches(silhouettes, on.replace(device="cpu"))
    for a, b in zip(there.epoch(1), here.epoch(1), strict=True):
        assert a.images.device.type == a.labels.device.type == on.device
        torch.testing.assert_close(a.images.cpu(), b.images)
        assert torch.equal(a.labels.cpu(), b.labels)


@pytest.mark.gpu
def test_few_images_stay_on_the_gpu_and_many_do_not(
    silhouettes: ImageSet, tiny: TrainingParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Batches(silhouettes, tiny, device="cuda").resident
    monkeypatch.setattr(batches, "MOST_OF_A_GPU", 1e-9)
    assert not Batches(silhouettes, tiny, device="cuda").resident


@pytest.mark.gpu
def test_precision_auto_is_bfloat16_on_a_gpu_that_has_it(
    tmp_path: Path, tiny: TrainingParameters
) -> None:
    has_it = torch.cuda.get_device_capability() >= (8, 0)
    place = str(tmp_path / "run")
    train_gan(tiny.replace(device="cuda", precision="auto", epochs=1), run=place)
    assert open_run(place).info()["precision_taken"] == ("bfloat16" if has_it else "float32")


@pytest.mark.gpu
def test_each_gpu_has_a_worker_and_they_speak_nccl(
    tmp_path: Path, tiny: TrainingParameters
) -> None:
    client = start_cluster()
    try:
        assert len(client.nthreads()) == torch.cuda.device_count()
        job = launch(client, tiny, run=str(tmp_path / "run"))
        assert job.result()[0].device == "cuda:0"
        assert open_run(str(tmp_path / "run")).info()["backend"] == "nccl"
    finally:
        close_cluster(client)


@pytest.mark.gpu
def test_two_ranks_share_a_gpu_over_gloo(tiny: TrainingParameters) -> None:
    client = start_cluster(2, device="cpu")
    try:
        told = tiny.replace(device="cuda")
        first, second = run_ranks(client, train_gan, device="cpu", parameters=told)
        assert first.weights_sha256 == second.weights_sha256
    finally:
        close_cluster(client)


@pytest.mark.gpu
def test_batchnorm_over_two_ranks_is_that_of_one(
    tmp_path: Path, tiny: TrainingParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TF32 would round sums that are split otherwise, by more than what is compared.
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    client, run = start_cluster(2, device="cpu"), str(tmp_path / "run")
    try:
        # The average is drawn on one rank, which must not wait for the other then.
        told = tiny.replace(device="cuda", sync_norm=True, epochs=2, ema_images=100)
        (one,) = run_ranks(client, train_gan, 1, device="cpu", parameters=told)
        first, second = run_ranks(client, train_gan, 2, device="cpu", parameters=told, run=run)
    finally:
        close_cluster(client)
    assert first.weights_sha256 == second.weights_sha256
    for alone, shared in zip(one.records, first.records, strict=True):
        assert shared["loss_d"] == pytest.approx(alone["loss_d"], rel=1e-3)
        assert shared["loss_g"] == pytest.approx(alone["loss_g"], rel=1e-3)


@pytest.mark.gpu
def test_compiled_on_a_gpu_it_trains_alike_and_is_resumed_to_the_bit(
    tmp_path: Path, tiny: TrainingParameters
) -> None:
    place, told = str(tmp_path / "run"), tiny.replace(device="cuda", compile="on", epochs=2)
    try:
        check_machine(told)
    except ParameterError as missing:
        pytest.skip(str(missing))
    plain, whole = train_gan(told.replace(compile="off")), train_gan(told)
    train_gan(told.replace(epochs=1), run=place)
    assert train_gan(told, run=place, resume=True).weights_sha256 == whole.weights_sha256
    for one, other in zip(plain.records, whole.records, strict=True):
        assert other["loss_d"] == pytest.approx(one["loss_d"], rel=1e-2)
        assert other["loss_g"] == pytest.approx(one["loss_g"], rel=1e-2)


@pytest.mark.gpu
def test_a_killed_worker_is_replaced_and_the_job_goes_on(
    tmp_path: Path, tiny: TrainingParameters
) -> None:
    client = start_cluster(device="cuda")
    try:
        told = tiny.replace(device="cuda", epochs=500, checkpoint_every=5)
        job = launch(client, told, run=str(tmp_path / "run"))
        deadline = time.monotonic() + 120
        while not job.run.epochs("checkpoints") and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(client.run(os.getpid)[job.workers[0]], signal.SIGKILL)
        job.result()
        assert len(job.restarts) == 1
        assert job.run.records()["iteration"].tolist() == list(range(1, 1501))
    finally:
        close_cluster(client)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_one_sentence_says_what_is_needed() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py"], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("make gpu needs a machine with an NVIDIA GPU")
    assert done.stderr.count("\n") == 1


@pytest.mark.long
def test_make_gpu_can_be_rehearsed_without_one() -> None:
    report = CHECKOUT / "gpu-report.md"
    command = [sys.executable, "benchmarks/gpu.py", "--rehearse", "--seconds", "40"]
    try:
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
        assert done.returncode == 0, report.read_text()
        (place,) = re.findall(r"newest picture: (.*)/dogs/samples/.*png", done.stdout)
        assert report.read_text().count("That took") == 4
        assert (Path(place) / "step.png").exists()
        shutil.rmtree(place)
    finally:
        report.unlink(missing_ok=True)
