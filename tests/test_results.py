from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dask_pytorch_ddp import dispatch
from distributed import Client, get_client
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gan_lib.base.errors import RunError
from gan_lib.gan.drawing import render
from gan_lib.jobs.launching import launch
from gan_lib.jobs.results_handler import DaskResultsHandler
from gan_lib.parameters import TrainingParameters
from gan_lib.practice.photographs import make_photographs
from gan_lib.results import watching
from gan_lib.results.files import LOSSES
from gan_lib.results.pictures import image_grid
from gan_lib.results.reading import RunStatus
from gan_lib.results.run import Run, open_run
from gan_lib.results.writing import RunWriter, create_run
from gan_lib.training.rank import train_gan


@pytest.fixture(scope="module")
def run(tiny: TrainingParameters, tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = str(tmp_path_factory.mktemp("results") / "run")
    train_gan(tiny, run=place)
    return open_run(place)


def test_records_have_every_loss_of_every_iteration(run: Run) -> None:
    records = run.records()
    assert list(records.columns[:2]) == ["iteration", "epoch"]
    assert set(LOSSES) <= set(records.columns)
    assert records["iteration"].tolist() == list(range(1, 13))
    np.testing.assert_allclose(records["loss_d"], records["loss_d_real"] + records["loss_d_fake"])
    assert run.records([2, 3])["epoch"].tolist() == [2] * 3 + [3] * 3


def test_samples_are_the_same_latent_vectors_every_time(run: Run) -> None:
    samples = run.samples()
    assert {picture.shape for picture in samples.values()} == {(64, 64, 1)}
    from gan_lib.base.seeds import SAMPLES, stream_seed
    from gan_lib.gan.drawing import latent_vectors

    z = latent_vectors(16, run.parameters.nz, stream_seed(run.parameters.seed, SAMPLES))
    np.testing.assert_array_equal(samples[4], image_grid(render(run.generator(4), z)))
    np.testing.assert_array_equal(samples[2], image_grid(render(run.generator(2), z)))
    assert not np.array_equal(samples[2], samples[4])


def test_new_images(run: Run) -> None:
    images = run.generate(6, seed=5)
    assert (images.shape, images.dtype) == ((6, 16, 16, 1), np.uint8)
    np.testing.assert_array_equal(images, run.generate(6, seed=5))
    assert not np.array_equal(images, run.generate(6, seed=6))


def test_tensorboard_opens_the_records(run: Run) -> None:
    events = EventAccumulator(f"{run.url}/tensorboard")
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(LOSSES)
    scalars = events.Scalars("loss_g")
    assert [event.step for event in scalars] == list(range(1, 13))
    np.testing.assert_allclose([event.value for event in scalars], run.records()["loss_g"])


def test_what_is_missing_is_named(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run lives at"):
        open_run(str(tmp_path))
    with pytest.raises(RunError, match="no checkpoint of epoch 3: it keeps epochs 2, 4"):
        run.generator(3)
    with pytest.raises(RunError, match="no samples of epoch 9"):
        run.samples([9])
    with pytest.raises(RunError, match="train one first"):
        open_run("latest")


def test_a_damaged_checkpoint_is_named(tiny: TrainingParameters, tmp_path: Path) -> None:
    train_gan(tiny.replace(epochs=1), run=str(tmp_path / "run"))
    run = open_run(str(tmp_path / "run"))
    path = Path(run.checkpoints()[1])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunError, match=r"checkpoint of epoch 1 .* is damaged"):
        run.generator()


ANSWERS: list[tuple[str, str, Callable[[Run], Any]]] = [
    ("parameters.json", "[]", Run.info),
    ("parameters.json", "{}", Run.info),
    ("parameters.json", '{"parameters": {"epochs": "many"}}', Run.info),
    ("parameters.json", '{"parameters": {}, "steps_per_epoch": 0}', Run.watch),
    ("parameters.json", "[" * 100_000, Run.info),
    ("status.json", "[]", Run.status),
    ("status.json", "\0", Run.stop),
    ("status.json", '{"state": 5}', Run.watch),
    ("status.json", '{"state": "training", "time": null}', Run.watch),
    ("status.json", '{"state": "finished", "restarts": 3}', Run.watch),
    ("records/epoch_0001.jsonl", "[]", Run.records),
    ("records/epoch_0001.jsonl", '{"iteration": 1, "epoch": "1"}', Run.records),
    ("records/epoch_0001.jsonl", '{"iteration": 1, "epoch": 1, "loss_d": "low"}', Run.records),
    ("samples/epoch_0001.png", "no picture", Run.samples),
    ("quality.jsonl", "[]", Run.quality),
    ("quality.jsonl", '{"epoch": 1, "kid": "low"}', Run.best_epoch),
]


@pytest.mark.parametrize(("path", "content", "ask"), ANSWERS)
def test_what_others_have_written_wrongly_is_one_sentence(
    run: Run, tmp_path: Path, path: str, content: str, ask: Callable[[Run], Any]
) -> None:
    copy = shutil.copytree(run.url, tmp_path / "run")
    opened = open_run(str(copy))
    (copy / path).write_text(content)
    with pytest.raises(RunError, match=f"{path} is damaged: ") as caught:
        ask(opened)
    assert len(str(caught.value)) < 300


def test_a_status_that_is_damaged_ends_a_training_in_one_sentence(
    tiny: TrainingParameters, tmp_path: Path
) -> None:
    class DamagesIt:
        def submit_result(self, path: str, data: str | bytes) -> None:
            # Whole at once, or a reader may find it empty.
            (tmp_path / "damaged").write_text("[]")
            (tmp_path / "damaged").replace(tmp_path / "run/status.json")

    with pytest.raises(RunError, match=r"status.json is damaged: it is \[\]"):
        train_gan(tiny, run=str(tmp_path / "run"), results=DamagesIt())


def test_what_a_later_version_has_written_is_passed_over(
    run: Run, tmp_path: Path, client: Client
) -> None:
    copy = shutil.copytree(run.url, tmp_path / "run")
    told = json.loads((copy / "parameters.json").read_text()) | {"later": {"a": 1}}
    told["parameters"]["lr_of_tomorrow"] = 3
    (copy / "parameters.json").write_text(json.dumps(told))
    status = {"state": "finished", "time": 5, "mood": ["good"], "restarts": ["once"]}
    (copy / "status.json").write_text(json.dumps(status))
    opened = open_run(str(copy))
    assert opened.parameters == run.parameters
    assert opened.status() == RunStatus("finished", 5.0, restarts=("once",))
    opened.watch()
    # But it cannot be gone on with as it was meant.
    with pytest.raises(RunError, match=r"does not know \(lr_of_tomorrow\)"):
        opened.resume(client)


def test_a_checkpoint_of_other_networks_is_named(run: Run, tmp_path: Path) -> None:
    copy = shutil.copytree(run.url, tmp_path / "run")
    told = json.loads((copy / "parameters.json").read_text())
    told["parameters"]["ngf"] = 16
    (copy / "parameters.json").write_text(json.dumps(told))
    with pytest.raises(RunError, match="checkpoints is damaged: RuntimeError: Error"):
        open_run(str(copy)).generator()


def test_a_sample_that_is_no_png_starts_no_program(run: Run, tmp_path: Path) -> None:
    """Pillow has Ghostscript run what calls itself EPS: here whatever is called `gs`."""
    copy = shutil.copytree(run.url, tmp_path / "run")
    (copy / "samples/epoch_0001.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    )
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    code = "import sys; from gan_lib import open_run; open_run(sys.argv[1]).samples([1])"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", code, copy], env=environment, capture_output=True, text=True
    )
    assert "RunError" in done.stderr
    assert "epoch_0001.png is damaged" in done.stderr
    assert not (tmp_path / "started").exists()


def test_a_source_in_the_words_of_somebody_else_is_said_again(
    tiny: TrainingParameters, s3: str, tmp_path: Path, client: Client
) -> None:
    source = str(make_photographs(tmp_path / "photographs", 8, dirt=False))
    parameters = tiny.replace(source=source, max_images=0)
    # Who can write into a bucket is not known.
    places = [f"{s3}/somebody-elses-{time.time_ns()}", str(tmp_path / "mine")]
    for place in places:
        create_run(place, parameters)
    if os.geteuid() == 0:
        places.insert(1, str(tmp_path / "theirs"))
        create_run(places[1], parameters)
        os.chown(tmp_path / "theirs" / "parameters.json", 1234, -1)
    *others, mine = map(open_run, places)
    for run in others:
        for ask in (run.images, lambda run=run: run.resume(client, epochs=9)):
            with pytest.raises(RunError, match=f"may be somebody else's.*{source}.*source="):
                ask()
        assert len(run.images(source=f"{source}/")) == 8
        with pytest.raises(RunError, match="and source is"):
            run.images(source=str(tmp_path))
    assert len(mine.images()) == 8
    # A name of data_manifest.json leads nowhere that is not known.
    known = f"{s3}/known-{time.time_ns()}"
    create_run(known, tiny)
    assert len(open_run(known).images()) == 96


def test_latest_is_the_newest(tiny: TrainingParameters, tmp_path: Path) -> None:
    from gan_lib.results import files

    for name in ("a", "c", "b"):
        create_run(f"{files.RUNS}/{name}", tiny)
    assert open_run("latest").url.endswith("b")


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    writer = RunWriter(str(tmp_path))
    writer.submit_result("records/epoch_0001.jsonl", "old")
    with open(tmp_path / "records/epoch_0001.jsonl") as reader:
        writer.submit_result("records/epoch_0001.jsonl", "new and longer")
        # Who had it open still reads the old one, and never a mixture.
        assert reader.read() == "old"
    assert (tmp_path / "records/epoch_0001.jsonl").read_text() == "new and longer"
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["epoch_0001.jsonl"]


def test_a_run_on_s3(client: Client, tiny: TrainingParameters, s3: str) -> None:
    launch(client, tiny, run=f"{s3}/runs/first").watch()
    there = open_run(f"{s3}/runs/first")
    assert there.status().state == "finished"
    assert there.records()["iteration"].tolist() == list(range(1, 13))
    assert sorted(there.samples()) == [1, 2, 3, 4]
    assert there.generate(2).shape == (2, 16, 16, 1)
    with pytest.raises(RunError, match="already holds a run"):
        launch(client, tiny, run=f"{s3}/runs/first")


def submits_many(handler: DaskResultsHandler, n: int) -> None:
    for i in range(n):
        handler.submit_result(f"numbers/{i:04d}.json", json.dumps({"i": i}))


def test_results_handler_delivers_everything(client: Client, tmp_path: Path) -> None:
    # More than the scheduler's log of a topic keeps (1,000).
    handler = DaskResultsHandler()
    future = client.submit(submits_many, handler, 1500, pure=False)
    handler.process_results(str(tmp_path), [future])
    found = sorted((tmp_path / "numbers").iterdir())
    assert [json.loads(path.read_text())["i"] for path in found] == list(range(1500))


def test_results_that_came_before_anybody_listened(client: Client, tmp_path: Path) -> None:
    handler = DaskResultsHandler("a-topic-of-this-test")
    future = client.submit(submits_many, handler, 10, pure=False)
    future.result()
    handler.process_results(str(tmp_path), [future])
    assert len(list((tmp_path / "numbers").iterdir())) == 10


def fails(handler: DaskResultsHandler) -> None:
    handler.submit_result("before.txt", "written")
    raise ArithmeticError("the cause")


def test_results_handler_raises_errors_if_asked(client: Client, tmp_path: Path) -> None:
    for raise_errors in (True, False):
        handler = DaskResultsHandler()
        future = client.submit(fails, handler, pure=False)
        folder = tmp_path / str(raise_errors)
        if raise_errors:
            with pytest.raises(ArithmeticError, match="the cause"):
                handler.process_results(str(folder), [future])
        else:
            handler.process_results(str(folder), [future], raise_errors=False)
        assert (folder / "before.txt").read_text() == "written"


def climbs_out(handler: DaskResultsHandler) -> None:
    handler.submit_result("../outside.txt", "written")


def test_results_stay_in_their_folder(client: Client, tmp_path: Path) -> None:
    handler = DaskResultsHandler()
    future = client.submit(climbs_out, handler, pure=False)
    with pytest.raises(RunError, match="outside"):
        handler.process_results(str(tmp_path / "inside"), [future])
    assert not (tmp_path / "outside.txt").exists()


def test_training_sends_its_records_through_the_handler(
    client: Client, tiny: TrainingParameters, tmp_path: Path
) -> None:
    assert get_client() is client
    handler = DaskResultsHandler()
    futures = dispatch.run(
        client, train_gan, parameters=tiny, results=handler, backend="gloo", pure=False
    )
    handler.process_results(str(tmp_path), futures)
    run = open_run(str(tmp_path))
    assert run.parameters == tiny
    assert run.records().to_dict("records") == futures[0].result().records


def test_grid_lays_images_in_rows() -> None:
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    grid = image_grid(images, columns=3)
    assert grid.shape == (4, 6, 1)
    assert grid[::2, ::2, 0].tolist() == [[0, 1, 2], [3, 4, 0]]


def test_who_watches_is_told_how_it_ended(
    tiny: TrainingParameters,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(watching, "SECONDS_WITHOUT_A_SIGN", 0)
    place = str(tmp_path / "run")
    create_run(place, tiny)
    writer = RunWriter(place)
    for state, words in (
        ("waiting", "has given no sign of life for 0 s"),
        ("failed", "the run has failed: no disk"),
        ("interrupted", "the run was interrupted: resume(client) goes on"),
    ):
        writer.set_status(state, error="no disk")
        open_run(place).watch()
        assert words in capsys.readouterr().out
