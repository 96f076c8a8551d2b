"""Many runs on one cluster: all of them, each once, whatever happens meanwhile."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from distributed import Client
from folders import add_greys

from gan_lib.base import storage
from gan_lib.base.errors import ParameterError, RunError, SourceError
from gan_lib.cluster.starting import close_cluster, start_cluster
from gan_lib.jobs.launching import launch
from gan_lib.jobs.sweeping import sweep
from gan_lib.parameters import TrainingParameters
from gan_lib.results.grids import list_runs, run_name
from gan_lib.results.pictures import image_grid, read_png
from gan_lib.results.sweep import Sweep
from gan_lib.results.sweep_pictures import GAP, draw_cells, plot_sweep
from gan_lib.results.writing import RunWriter
from gan_lib.training.rank import train_gan


def test_the_list_of_runs(tiny: TrainingParameters) -> None:
    grid = {"lr_g": [1e-4, 2e-4], "seed": [0, 1, 2]}
    runs = list_runs(tiny, grid)
    assert list(runs)[:2] == ["lr_g=0.0001_seed=0", "lr_g=0.0001_seed=1"]
    assert [tuple(values.values()) for values in runs.values()] == [
        (lr, seed) for lr in grid["lr_g"] for seed in grid["seed"]
    ]
    paired = list_runs(tiny, {"lr_g": [1e-4, 1], "lr_d": [2e-4, 3e-4]}, paired=True)
    assert list(paired.values()) == [{"lr_g": 1e-4, "lr_d": 2e-4}, {"lr_g": 1.0, "lr_d": 3e-4}]
    some = list_runs(tiny, grid, sample=4)
    assert len(some) == 4
    assert some.items() <= runs.items()
    assert list(some) == list(list_runs(tiny, grid, sample=4))


def test_names_become_paths_that_stay_apart() -> None:
    one, other = (run_name({"source": f"s3://bucket/{name}"}) for name in ("a/b", "a-b"))
    assert one != other
    assert not {"/", ":"} & {*one, *other}
    assert run_name({"augment": "", "flip": True}) == "augment=_flip=True"
    assert len(run_name({"source": "x" * 500})) < 200


@pytest.mark.parametrize(
    ("grid", "told", "said"),
    [
        ({}, {}, "no parameter to vary"),
        ({"lrg": [1.0]}, {}, "did you mean 'lr_g'"),
        ({"lr_g": 1e-4}, {}, "lr_g is 0.0001, expected a list"),
        ({"loss": "bce"}, {}, "loss is 'bce', expected a list"),
        ({"lr_g": []}, {}, "lr_g is \\[\\], expected a list"),
        ({"lr_g": [1e-4, -1.0]}, {}, "lr_g is -1.0: a learning rate"),
        ({"seed": [1, 1]}, {}, "has seed=1 twice"),
        ({"lr_g": [1, 1.0]}, {}, "has lr_g=1.0 twice"),
        ({"seed": [1, 2], "nz": [8]}, {"paired": True}, "seed has 2, nz has 1"),
        ({"seed": [1, 2]}, {"sample": 3}, "drawn at random is 3, expected .* from 1 to 2"),
    ],
)
def test_a_list_that_cannot_be_trained(
    grid: Any, told: Any, said: str, tiny: TrainingParameters
) -> None:
    with pytest.raises(ParameterError, match=said):
        list_runs(tiny, grid, **told)


def times(folder: Path) -> dict[str, int]:
    """When the files of the runs were written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*/*") if path.is_file()}


def test_a_sweep_and_the_same_call_again(
    client: Client, tiny: TrainingParameters, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    p = tiny.replace(epochs=1)
    # There are 96 images: half of the runs cannot even be launched.
    told: dict[str, Any] = {"batch_size": [32, 97], "seed": [0, 1]}
    done = sweep(client, p, told, str(out))
    table = done.table()
    assert table["state"].tolist() == ["finished", "finished", "failed", "failed"]
    assert table["steps"][:2].tolist() == [3, 3]
    assert table["error"].str.contains("batch_size is 97, and there are 96 images").sum() == 2
    assert (out / "sweep.csv").read_text() == table.to_csv(index=False)
    assert (out / "sweep.png").exists()

    # The same latent vectors in each cell; a sentence where there is no picture.
    cells = draw_cells(done)
    run = done.run("batch_size=32_seed=1")
    assert run is not None
    drawn = cells["batch_size=32_seed=1"].picture
    assert np.array_equal(drawn, image_grid(run.generate(16, seed=0), gap=GAP))
    page = (out / "sweep.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["grid"] == told
    images = [run["image"] for run in data["runs"]]
    assert np.array_equal(read_png(base64.b64decode(images[1].partition(",")[2])), drawn)
    assert images[2:] == ["", ""]
    assert "batch_size is 97" in data["runs"][2]["text"]
    figure = plot_sweep(done, rows="seed", cells=cells)
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["seed = 0", "", "seed = 1", ""]
    with pytest.raises(ParameterError, match=r"nz does not vary in .*: batch_size, seed do"):
        plot_sweep(done, rows="nz", cells=cells)

    before = times(out)
    again = sweep(client, p, told, str(out))
    assert times(out) == before
    assert again.table().equals(table)
    sweep(client, p, told, str(out), retry_failed=True)
    assert [path for path in times(out).items() if path not in before.items()] == []

    for other, grid, ranks, said in [
        (p.replace(nz=8), told, 1, "holds another sweep: nz was 16 and is 8"),
        (p, told, 2, "a run had 1 ranks and is to have 2"),
        (p, {"seed": [0, 1]}, 1, "it has 4 runs of batch_size, seed, and these are 2 runs of seed"),
        (p, {"batch_size": [32, 96], "seed": [0, 1]}, 1, "its values are others"),
    ]:
        with pytest.raises(RunError, match=said):
            sweep(client, other, grid, str(out), ranks=ranks)
    with pytest.raises(ParameterError, match="ranks is 0, expected 1 or more"):
        sweep(client, p, told, str(tmp_path / "none"), ranks=0)
    with pytest.raises(ParameterError, match="stop_worst is 2, and quality_every 0"):
        sweep(client, p, told, str(tmp_path / "none"), stop_worst=2)
    with pytest.raises(SourceError, match="nowhere"):
        sweep(client, p, {"source": [str(tmp_path / "nowhere")]}, str(tmp_path / "none"))
    with pytest.raises(RunError, match=r"cannot be used from the worker .*does not see"):
        sweep(client, p, told, "memory://sweep")
    assert not [path for path in tmp_path.iterdir() if path.name not in ("sweep", "runs")]
    (out / "sweep.json").write_text((out / "sweep.json").read_text().replace("seed=1", "../up"))
    with pytest.raises(RunError, match=r"sweep.json is damaged: .*'batch_size=32_../up'"):
        Sweep(str(out))


def test_why_a_run_cannot_go_on_is_kept(
    client: Client, tiny: TrainingParameters, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    add_greys(images, range(4))
    out, p = tmp_path / "sweep", tiny.replace(source=str(images), batch_size=4, epochs=2)
    train_gan(p.replace(epochs=1), run=str(out / "seed=0"), progress=False)
    RunWriter(str(out / "seed=0")).set_status("stopped")
    add_greys(images, [9])
    # What a killed call has left is put away by the next.
    (out / f"sweep.csv.{storage._MACHINE}.{'0' * 32}.part").touch()
    table = sweep(client, p, {"seed": [0, 1]}, str(out)).table()
    assert table["state"].tolist() == ["failed", "finished"]
    assert "images" in table["error"][0]
    assert not list(out.rglob("*.part"))


def test_two_sweeps_and_a_job_on_one_cluster(
    client: Client, tiny: TrainingParameters, s3: str, tmp_path: Path
) -> None:
    elsewhere = Client(client.cluster, set_as_default=False)
    # It takes all that there are, and what becomes free.
    greedy = launch(elsewhere, tiny.replace(epochs=100_000), run=str(tmp_path / "greedy"))
    places = [str(tmp_path / "sweep"), f"{s3}/sweep-{time.time_ns()}"]
    try:
        sides = [
            threading.Thread(target=sweep, args=(one, tiny, {"seed": [0, 1]}, place))
            for one, place in zip((client, elsewhere), places, strict=True)
        ]
        for side in sides:
            side.start()
        while not greedy.run.epochs("records"):
            assert not greedy.done()
            time.sleep(0.1)
        greedy.stop(now=True)
        assert greedy.result(timeout=100)[0].stopped
        for side in sides:
            side.join()
    finally:
        elsewhere.close()
    tables = [Sweep(place).table() for place in places]
    for table in tables:
        assert table["state"].tolist() == ["finished", "finished"]
        assert table["steps"].tolist() == [12, 12]
    assert tables[0]["loss_d"].tolist() == tables[1]["loss_d"].tolist()


def states(out: Path) -> Counter[str]:
    """How many runs are in each state."""
    done = Sweep(str(out))
    return Counter(done.state(name)[0] for name in done.runs)


@pytest.mark.long
def test_a_cluster_that_grows_and_shrinks(tiny: TrainingParameters, tmp_path: Path) -> None:
    out = str(tmp_path / "sweep")
    client = start_cluster(1, device="cpu")
    p = tiny.replace(epochs=100)
    side = threading.Thread(target=sweep, args=(client, p, {"seed": list(range(6))}, out))

    def until(what: str, at_least: int) -> None:
        while not Path(out, "sweep.json").exists() or states(Path(out))[what] < at_least:
            assert side.is_alive()
            time.sleep(0.1)

    try:
        side.start()
        until("finished", 1)
        client.cluster.scale(2)
        until("training", 2)
        until("finished", 2)
        client.cluster.scale(1)
        side.join()
    finally:
        close_cluster(client)
    assert states(Path(out)) == {"finished": 6}
    for name in Sweep(out).runs:
        records = Sweep(out).run(name).records()
        assert records["iteration"].tolist() == list(range(1, 301))


@pytest.mark.long
def test_the_worst_are_stopped_and_stay_so(
    client: Client, tiny: TrainingParameters, tmp_path: Path
) -> None:
    p = tiny.replace(epochs=6, quality_every=1, quality_images=48)
    grid = {"lr_g": [2e-4, 1e-3], "seed": [0, 1]}
    done = sweep(client, p, grid, str(tmp_path / "sweep"), stop_worst=2)
    table = done.table()
    assert (table["state"] == "finished").all()
    early = table[table["epochs"] < 6]
    assert 1 <= len(early) < 4
    kids = {name: {line["epoch"]: line["kid"] for line in done.run(name).quality()}
            for name in done.runs}  # fmt: skip
    for name, why in early[["run", "error"]].itertuples(index=False):
        found = re.match(r"after epoch (\d+) its KID of ([\d.]+) was not among the best", why)
        assert found, why
        kid = kids[name][int(found[1])]
        assert found[2] == f"{kid:.4f}"
        assert kid > min(other[int(found[1])] for other in kids.values() if int(found[1]) in other)
    assert sweep(client, p, grid, str(tmp_path / "sweep"), stop_worst=2).table().equals(table)


def disturb(client: Client, out: Path, rng: random.Random) -> None:
    """Kill two workers at random moments of a sweep that goes on, then press Ctrl-C."""

    def until_finished(n: int) -> None:
        while not (out / "sweep.json").exists() or states(out)["finished"] < n:
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 3))

    for n in (0, 1):
        until_finished(n)
        # Of the nannies, because a worker that was just killed answers nobody; it has no process
        # until it is started anew.
        while not (pids := [nanny.pid for nanny in client.cluster.workers.values() if nanny.pid]):
            time.sleep(0.1)
        os.kill(rng.choice(pids), signal.SIGKILL)
    until_finished(2)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.long
@pytest.mark.parametrize("seeds", [1, 3])
def test_two_kills_an_interrupt_and_the_same_call_again(
    seeds: int, own_client: Client, tiny: TrainingParameters, tmp_path: Path
) -> None:
    seed = int(os.environ.get("GAN_LIB_FAULT_SEED", time.time()))
    print(f"GAN_LIB_FAULT_SEED={seed}")
    p = tiny.replace(epochs=24, checkpoint_every=5, quality_every=24, quality_images=48)
    grid = {"lr_g": [1e-4, 2e-4], "lr_d": [2e-4, 3e-4], "seed": list(range(seeds))}
    out = tmp_path / "disturbed"
    told = (own_client, out, random.Random(seed))
    hand = threading.Thread(target=disturb, args=told, daemon=True)
    hand.start()
    with pytest.raises(KeyboardInterrupt):
        sweep(own_client, p, grid, str(out))
    hand.join()
    # What was begun has a checkpoint of where it was; on a busy machine one that was only being
    # launched may be left as it was.
    print(states(out))
    assert states(out).keys() <= {"finished", "stopped", "interrupted", "new"}
    other = Sweep(str(out))
    for name in other.runs:
        run = other.run(name)
        if run is not None and run.status().state == "stopped" and run.epochs("records"):
            assert run.positions()
    sweep(own_client, p, grid, str(out))

    calm = sweep(own_client, p, grid, str(tmp_path / "calm"))
    both = [which.table().drop(columns=["images_per_second", "minutes"]) for which in (calm, other)]
    assert both[0]["state"].tolist() == ["finished"] * 4 * seeds
    pd.testing.assert_frame_equal(*both)
    left, right = draw_cells(calm), draw_cells(other)
    for name in calm.runs:
        assert left[name].text == right[name].text
        assert np.array_equal(left[name].picture, right[name].picture)
        assert other.run(name).records()["iteration"].tolist() == list(range(1, 73))
    assert not list(out.rglob("*.part"))
