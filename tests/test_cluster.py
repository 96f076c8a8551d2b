from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch
import torch.distributed as dist
from dask_pytorch_ddp import dispatch
from distributed import Client
from folders import add_greys
from foreign import foreign_cluster

from gan_lib.base.checkout import CHECKOUT
from gan_lib.base.errors import ClusterError, ParameterError, RunError, SourceError
from gan_lib.cluster.shipping import package_checksum
from gan_lib.cluster.starting import close_cluster, connect
from gan_lib.cluster.starting import start_cluster as start
from gan_lib.cluster.workers import Watch, find_places
from gan_lib.jobs import rank_task
from gan_lib.jobs.launching import launch, run_ranks
from gan_lib.jobs.rank_group import pick_gpus
from gan_lib.jobs.rank_task import RankTask, work_as_rank
from gan_lib.parameters import TrainingParameters
from gan_lib.results.run import open_run
from gan_lib.training.rank import train_gan


def test_launch_trains_equal_replicas(
    client: Client, tiny: TrainingParameters, tmp_path: Path
) -> None:
    job = launch(client, tiny, run=str(tmp_path / "run"))
    job.watch()
    first, second = job.result()
    assert job.status == "finished"
    assert [r.rank for r in (first, second)] == [0, 1]
    assert first.world_size == 2
    assert first.weights_sha256 == second.weights_sha256
    run = open_run(str(tmp_path / "run"))
    assert run.info()["world_size"] == 2
    assert run.info()["backend"] == "gloo"
    assert run.records()["iteration"].tolist() == list(range(1, 13))
    assert run.generate(5).shape == (5, 16, 16, 1)


def test_launch_returns_at_once_and_can_be_stopped(
    client: Client, tiny: TrainingParameters, tmp_path: Path
) -> None:
    place = str(tmp_path / "run")
    job = launch(client, tiny.replace(epochs=100_000, keep_checkpoints=1), run=place)
    assert job.status in ("waiting", "training")
    deadline = time.monotonic() + 60
    while not job.run.epochs("records") and time.monotonic() < deadline:
        time.sleep(0.1)
    with pytest.raises(TimeoutError, match="still runs after 0 s"):
        job.result(timeout=0)
    job.stop()
    assert job.result(timeout=60)[0].stopped
    assert job.status == "stopped"
    done = job.run.epochs("records")[-1]
    assert sorted(job.run.checkpoints()) == [done]
    again = launch(client, tiny.replace(epochs=done + 1), run=place, resume=True)
    assert again.result(timeout=60)[0].epochs == 1
    assert job.run.records()["iteration"].tolist() == list(range(1, 3 * (done + 1) + 1))


def test_resume_on_two_ranks_is_bit_identical(
    client: Client, tiny: TrainingParameters, tmp_path: Path
) -> None:
    whole = launch(client, tiny, run=str(tmp_path / "whole")).result()
    half = str(tmp_path / "half")
    launch(client, tiny.replace(epochs=2), run=half).result()
    rest = launch(client, tiny, run=half, resume=True).result()
    assert rest[0].epochs == 2
    assert rest[1].weights_sha256 == whole[0].weights_sha256


def dispatched(client: Client, function: Callable[..., Any], **told: Any) -> list[Any]:
    """The article's way, but not at its port, which any other process may have."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    submit = client.submit

    def elsewhere(*given: Any, master_port: int, **named: Any) -> Any:
        return submit(*given, master_port=port, **named)

    with patch.object(client, "submit", elsewhere):
        futures = dispatch.run(client, function, backend="gloo", pure=False, **told)
    try:
        # Nobody tells of a rank whose worker is gone: such a task waits for ever.
        return [future.result(timeout=100) for future in futures]
    finally:
        client.cancel(futures)


def test_dispatch_run_as_in_the_article(client: Client, tiny: TrainingParameters) -> None:
    parameters = tiny.to_dict()  # a dictionary of parameters can be passed to the job
    first, second = dispatched(client, train_gan, parameters=parameters)
    assert first.weights_sha256 == second.weights_sha256
    assert [r["iteration"] for r in first.records] == list(range(1, 13))


def test_two_jobs_share_a_cluster(client: Client, tiny: TrainingParameters, tmp_path: Path) -> None:
    jobs = [launch(client, tiny.replace(epochs=100_000), n_workers=1) for _ in range(2)]
    with pytest.raises(ClusterError, match="2 workers, 2 of which train for another job"):
        launch(client, tiny, run=str(tmp_path / "third"))
    assert jobs[0].workers != jobs[1].workers
    assert jobs[0].run.url != jobs[1].run.url
    for job in jobs:
        job.stop()
        assert job.result(timeout=100)[0].stopped
        records = job.run.records()
        assert records["iteration"].tolist() == list(range(1, len(records) + 1))
    # Neither has left a trace in the other.
    both = [job.run.records([1])["loss_d"].tolist() for job in jobs]
    assert both[0] == both[1]


def test_of_two_that_look_for_workers_at_once_each_gets_its_own(client: Client) -> None:
    elsewhere = Client(client.cluster, set_as_default=False)
    sides = [(client, Watch(client)), (elsewhere, Watch(elsewhere))]
    for _ in range(10):
        together = threading.Barrier(2)

        def take(side: tuple[Client, Watch], together: threading.Barrier = together) -> str:
            together.wait()
            return find_places(side[0], 1, 1, side[1])[0].worker

        with ThreadPoolExecutor(2) as pool:
            assert len(set(pool.map(take, sides))) == 2
        with pytest.raises(ClusterError, match="2 workers, 2 of which train for another job"):
            find_places(client, 1, 1, Watch(client))
        # A claim is of as many as are named last; what one has is not refused to oneself.
        assert len(sides[1][1].alive()) == 2
        assert sides[1][1].claim([find_places(elsewhere, 1, 1, sides[1][1])[0].worker])
        sides[0][1].release()
        (free,) = find_places(client, 1, None, sides[0][1])
        assert not Watch(client).claim([free.worker])
        for _, watch in sides:
            watch.release()
    # Who goes leaves nothing behind.
    assert sides[1][1].claim(list(client.nthreads()))
    elsewhere.close()
    assert len(find_places(client, 2, None)) == 2


def test_no_port_stays_open_after_a_job(client: Client, tiny: TrainingParameters) -> None:
    def listening() -> set[int]:
        process = psutil.Process()
        found = process.net_connections("inet")
        return {c.laddr.port for c in found if c.status == psutil.CONN_LISTEN}

    before = client.run(listening)
    for _ in range(2):
        # The article's way meets at a fixed port: the second job hangs if the first keeps it.
        dispatched(client, train_gan, parameters=tiny)
        run_ranks(client, train_gan, parameters=tiny)
    after = client.run(listening)
    assert all(ports <= before[worker] for worker, ports in after.items())


def environment() -> dict[str, str]:
    return dict(os.environ)


def test_a_rank_leaves_the_environment_as_it_was(client: Client) -> None:
    before = client.run(environment)
    inside = run_ranks(client, environment)
    assert {rank["LOCAL_RANK"] for rank in inside} == {"0"}
    assert client.run(environment) == before
    # Nobody listens where this one is to meet the others.
    with socket.create_server(("127.0.0.1", 0)) as probe:
        free = probe.getsockname()[1]
    task = RankTask(1, 2, gpu=0, backend="gloo", host="127.0.0.1", port=free, attempt="job-0-1")
    failed = client.submit(work_as_rank, int, {}, task, pure=False).result(timeout=60)
    assert isinstance(failed.error, ConnectionRefusedError)
    assert client.run(environment) == before


def hang_while_meeting() -> None:
    """On a worker: as gloo hangs, now and then, when another rank dies at the wrong moment."""
    rank_task.SECONDS_TO_FAIL = 1
    dist.init_process_group = lambda *_, **__: threading.Event().wait()


@pytest.mark.long
def test_a_rank_that_nothing_wakes_is_ended_with_its_worker(own_client: Client) -> None:
    worker = next(iter(own_client.nthreads()))
    own_client.run(hang_while_meeting, workers=[worker])
    before = {nanny.pid for nanny in own_client.cluster.workers.values()}
    (port,) = own_client.run(rank_task.listen, "127.0.0.1", workers=[worker]).values()
    task = RankTask(0, 1, gpu=0, backend="gloo", host="127.0.0.1", port=port, attempt="job-0-1")
    future = own_client.submit(work_as_rank, int, {}, task, workers=[worker], pure=False)
    with pytest.raises(TimeoutError):
        future.result(timeout=3)
    future.cancel()
    deadline = time.monotonic() + 60
    while {nanny.pid for nanny in own_client.cluster.workers.values()} == before:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # A worker that is a new one can be a rank.
    own_client.wait_for_workers(2, timeout=60)
    assert len(run_ranks(own_client, environment)) == 2


def test_ranks_wait_for_the_last_one_no_longer_than_they_may(client: Client) -> None:
    worker = next(iter(client.nthreads()))

    def alone(port: int) -> str:
        with patch.object(rank_task, "SECONDS_TO_MEET", 1):
            task = RankTask(0, 2, gpu=0, backend="gloo", host="127.0.0.1", port=port)
            return type(work_as_rank(int, {}, task).error).__name__

    (port,) = client.run(rank_task.listen, "127.0.0.1", workers=[worker]).values()
    future = client.submit(alone, port, workers=[worker], pure=False)
    assert future.result(timeout=60) == "DistStoreError"


def fails_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ArithmeticError("the cause")
    dist.all_reduce(torch.ones(1))


def test_the_first_error_is_shown_with_its_traceback(client: Client) -> None:
    for _ in range(3):
        with pytest.raises(ArithmeticError, match="the cause") as caught:
            run_ranks(client, fails_on_rank_1)
        assert any("rank 1 of 2" in note for note in caught.value.__notes__)
        assert any(entry.name == "fails_on_rank_1" for entry in caught.traceback)


def fail_to_become_a_rank() -> str:
    try:
        dist.init_process_group(
            "gloo", store=dist.HashStore(), rank=0, world_size=2, timeout=timedelta(seconds=1)
        )
    except dist.DistError as error:
        return str(error)
    raise AssertionError("nobody was there")


@pytest.mark.timeout(120)
def test_a_worker_that_failed_to_become_a_rank_can_become_one(client: Client) -> None:
    worker = min(client.nthreads())
    assert client.submit(fail_to_become_a_rank, workers=[worker], pure=False).result(timeout=60)
    assert run_ranks(client, dist.get_world_size, n_workers=2) == [2, 2]


def test_a_failed_launch_says_so(client: Client, tiny: TrainingParameters, tmp_path: Path) -> None:
    job = launch(client, tiny.replace(batch_size=1))
    with pytest.raises(ParameterError, match="batch_size 1 "):
        job.watch()
    assert job.status == "failed"
    assert "batch_size 1 " in job.run.status().error
    # The workers are free again, and so is the place: the run had made nothing.
    again = launch(client, tiny.replace(epochs=1), run=job.run.url)
    assert again.result()[0].epochs == 1


def test_an_error_of_the_code_is_kept_with_its_type(
    client: Client, tiny: TrainingParameters
) -> None:
    def fails(**told: Any) -> None:
        raise KeyError("nz")

    job = launch(client, tiny, function=fails)
    with pytest.raises(KeyError, match="nz"):
        job.result(timeout=60)
    assert job.run.status().error == "KeyError: 'nz'"


def test_a_launch_without_images_ends_before_it_begins(
    client: Client, tiny: TrainingParameters, tmp_path: Path
) -> None:
    place = str(tmp_path / "run")
    with pytest.raises(SourceError, match="nowhere"):
        launch(client, tiny.replace(source=str(tmp_path / "nowhere")), run=place)
    assert not os.path.exists(place)


def test_too_small_batches_for_the_ranks(client: Client, tiny: TrainingParameters) -> None:
    with pytest.raises(ParameterError, match="batch_size 1 "):
        launch(client, tiny.replace(batch_size=1)).result()


def test_wrong_calls_are_refused_before_any_work(
    client: Client, tiny: TrainingParameters, tmp_path: Path
) -> None:
    with pytest.raises(ParameterError, match="lr_g"):
        launch(client, {"lrg": 0.1})
    with pytest.raises(ClusterError, match="2 workers and 3 are needed"):
        launch(client, tiny, n_workers=3)
    with pytest.raises(ParameterError, match="has no boxes"):
        launch(client, tiny.replace(crop="box"), run=str(tmp_path / "boxes"))
    assert not (tmp_path / "boxes").exists()
    with pytest.raises(ParameterError, match=r"n_workers is no parameter .* n_workers=\.\.\."):
        launch(client, {"n_workers": 2})
    with pytest.raises(ParameterError, match="batch_size is 97, and there are 96 images"):
        launch(client, tiny.replace(batch_size=97), run=str(tmp_path / "large"))
    with pytest.raises(RunError, match=r"worker tls://.* does not see memory://run"):
        launch(client, tiny, run="memory://run")
    launch(client, tiny.replace(epochs=1), run=str(tmp_path / "run")).result()
    with pytest.raises(RunError, match="already holds a run"):
        launch(client, tiny, run=str(tmp_path / "run"))
    with pytest.raises(RunError, match="no run lives"):
        launch(client, tiny, run=str(tmp_path / "nowhere"), resume=True)
    with pytest.raises(ClusterError, match="n_workers is 0"):
        start(0)
    with pytest.raises(ParameterError, match=r"min_workers is 0, .* at least 1, 0 and 0"):
        launch(client, tiny, min_workers=0)


def test_nothing_listens_beyond_this_machine(client: Client, tiny: TrainingParameters) -> None:
    job = launch(client, tiny.replace(epochs=100_000))
    deadline = time.monotonic() + 60
    while not job.run.epochs("records") and time.monotonic() < deadline:
        time.sleep(0.1)
    found = [
        connection.laddr
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    job.stop()
    job.result(timeout=60)
    assert len(found) >= 4  # scheduler, dashboard, two workers
    assert {address.ip for address in found} <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize(
    ("seen", "local_ranks", "indices", "backend"),
    [
        ([["a"], ["b"]], [0, 1], [0, 0], "nccl"),  # one visible to each
        ([["a", "b"], ["b", "a"]], [0, 1], [0, 0], "nccl"),  # dask-cuda: its own first
        ([["a", "b"], ["a", "b"]], [0, 1], [0, 1], "nccl"),  # nobody told them apart
        ([["a", "b"], ["a", "b"], ["c"]], [0, 1, 0], [0, 1, 0], "nccl"),  # two machines
        ([["a"], ["a"]], [0, 1], [0, 0], "gloo"),  # two ranks on one GPU
        ([["a"], []], [0, 1], [0, 0], "gloo"),  # one without
    ],
)
def test_gpus_are_shared_out(
    seen: list[list[str]], local_ranks: list[int], indices: list[int], backend: str
) -> None:
    assert pick_gpus(seen, local_ranks) == (indices, backend)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ClusterError, match="device is 'cuda', but this machine shows no GPU"):
        start(device="cuda")


def test_where_no_scheduler_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        free = probe.getsockname()[1]
    with pytest.raises(ClusterError, match=f"127.0.0.1:{free}"):
        connect(f"tcp://127.0.0.1:{free}")
    with pytest.raises(ClusterError, match="nonsense"):
        connect("nonsense://")


def test_a_cluster_without_gan_lib_gets_it(tiny: TrainingParameters, tmp_path: Path) -> None:
    with foreign_cluster(tmp_path) as address:
        with Client(address) as plain:
            plain.wait_for_workers(2, timeout=60)
            code = "__import__('importlib.util').util.find_spec('gan_lib') is None"
            assert set(plain.run(eval, code).values()) == {True}
        client = connect(address)
        try:
            client.run(
                exec, "import sys; sys.modules['simplejpeg'] = None"
            )  # as if it were missing
            with pytest.raises(
                ClusterError, match=r"cannot import simplejpeg: .*requirements\.lock"
            ):
                launch(client, tiny, run=str(tmp_path / "none"))
            client.run(exec, "import sys; del sys.modules['simplejpeg']")
            job = launch(client, tiny.replace(epochs=1), run=str(tmp_path / "run"))
            assert len(job.result(timeout=120)) == 2
            origins = set(client.run(eval, "__import__('gan_lib').__file__").values())
            assert all(".zip" in origin for origin in origins)
            assert set(client.run(package_checksum).values()) == {package_checksum()}
        finally:
            close_cluster(client)
        # Closing our client leaves the cluster to its owner.
        with Client(address) as plain:
            assert len(plain.nthreads()) == 2


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)


def rank_while_another_cluster_starts(folder: Path) -> int:
    (folder / "training").touch()
    wait_for(folder / "other")
    return dist.get_rank()


def test_a_cluster_that_was_started_later_disturbs_nobody(
    client: Client, tiny: TrainingParameters, tmp_path: Path
) -> None:
    with ThreadPoolExecutor(1) as pool:
        told = {"device": "cpu", "folder": tmp_path}
        ranks = pool.submit(run_ranks, client, rank_while_another_cluster_starts, **told)
        wait_for(tmp_path / "training")
        other = start(1, device="cpu")
        (tmp_path / "other").touch()
    try:
        assert ranks.result() == [0, 1]
        add_greys(tmp_path / "images", range(8))
        greys = tiny.replace(source=str(tmp_path / "images"), batch_size=4, epochs=1)
        assert len(launch(client, greys, run=str(tmp_path / "run")).result()) == 2
    finally:
        close_cluster(other)


CHANGED = """
import pathlib
import gan_lib
from gan_lib import close_cluster, run_ranks, start_cluster

if __name__ == "__main__":
    file = pathlib.Path(gan_lib.__path__[0], "gan", "steps.py")
    file.write_text(file.read_text() + "# changed\\n")
    client = start_cluster(1, device="cpu")
    for _ in range(2):
        try:
            run_ranks(client, int)
        except gan_lib.base.errors.ClusterError as error:
            print(error)
    close_cluster(client)
"""


def test_code_that_changes_under_a_process_is_not_mixed(tmp_path: Path) -> None:
    shutil.copytree(CHECKOUT / "gan_lib", tmp_path / "gan_lib")
    shutil.copy(CHECKOUT / "data_manifest.json", tmp_path)
    script = tmp_path / "changed.py"
    script.write_text(CHANGED)
    ended = subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ended.stdout.count("have changed since this process imported them") == 2
    assert "Traceback" not in ended.stderr


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text("from gan_lib import start_cluster\n\nstart_cluster(2, device='cpu')\n")
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "put this under `if __name__" in ended.stderr
    assert ended.stderr.count("Traceback") == 1
