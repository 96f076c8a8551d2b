"""The doctor finds what was planted, says how to mend it, and nothing bad of what is well."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from distributed import Client, Event
from fault_proxy import fault_proxy
from foreign import ForeignCluster, started
from s3fs import S3FileSystem
from test_shards import make_folder
from uploading import upload

from gan_lib.__main__ import main
from gan_lib.base.checkout import CHECKOUT
from gan_lib.base.errors import ParameterError
from gan_lib.doctor import network
from gan_lib.doctor.examining import CHECKS, Check, code_of, examine, explain, find
from gan_lib.doctor.finding import Finding, ok
from gan_lib.doctor.patient import Patient
from gan_lib.parameters import TrainingParameters
from gan_lib.practice.hosts import INTERFACE, Hosts
from gan_lib.practice.s3_server import serve_s3

LETTERS = {check.name: letter for letter, check in CHECKS.items()}


def found(name: str, client: Client | None = None, **values: Any) -> Finding:
    """What one check finds."""
    return find(CHECKS[LETTERS[name]], Patient(values, client))


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes a small file system of its own; for root alone."""
    place = tmp_path / "small"
    place.mkdir()

    def make(size: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
        return place

    yield make
    subprocess.run(["umount", place], capture_output=True)


def test_nothing_bad_is_said_of_a_healthy_cluster(
    client: Client, s3: str, tiny: TrainingParameters, tmp_path: Path, monkeypatch: Any
) -> None:
    place = f"{s3}/doctor-{time.time_ns()}"
    upload(make_folder(tmp_path / "dogs", ["a", "b"], 2), f"{place}/dogs")
    monkeypatch.setenv("GAN_LIB_CACHE", str(tmp_path / "cache"))
    told = tiny.to_dict() | {"source": f"{place}/dogs", "run": f"{place}/run", "n_workers": 2}
    findings = dict(examine(Patient(told, client)))
    assert code_of(findings) == "OK", findings
    not_needed = {"shared memory", "one gpu each", "bfloat16"}
    unchecked = {CHECKS[le].name for le, f in findings.items() if f.verdict == "not checked"}
    assert unchecked == (not_needed if not torch.cuda.is_available() else {"bfloat16"})
    # It has left nothing behind.
    assert not os.path.exists(tmp_path / "cache" / "prepared")


def test_a_full_disk(mount: Callable[[str], Path], tmp_path: Path) -> None:
    assert found("disk", run=str(tmp_path)).verdict == "ok"
    place = mount("1m")
    full = found("disk", run=str(place / "runs" / "first"))
    assert full.verdict == "fault"
    assert f"1 MB free for {place}" in full.found
    assert "-p run PLACE" in full.cure


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GAN_LIB_CACHE", str(tmp_path / "file" / "cache"))
    refused = found("cache")
    assert refused.verdict == "fault"
    assert str(tmp_path / "file" / "cache") in refused.found
    assert "GAN_LIB_CACHE" in refused.cure


def test_a_small_shared_memory() -> None:
    code = (
        "from gan_lib.doctor import Patient, machine\n"
        "found = machine.shared_memory(Patient({'device': 'cuda'}))\n"
        "print(found.verdict, found.found, found.cure)"
    )
    shell = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$0" -c "$1"'
    command = ["unshare", "--mount", "sh", "-c", shell, sys.executable, code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT)
    if not done.stdout:
        pytest.skip(f"no mount of its own here: {done.stderr.strip()[-200:]}")
    assert done.stdout.startswith("fault this machine: 64 MB free in /dev/shm")
    assert "--shm-size=1g" in done.stdout
    assert found("shared memory", device="cpu").verdict == "not checked"


OTHER_TORCH = """
import importlib, sys
here = {folder!r}
sys.path.remove(here)
del sys.modules["torch"]
importlib.import_module("torch").__version__ = "2.11.0"
"""


def test_workers_that_differ_and_are_not_as_they_should(tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "torch").mkdir(parents=True)
    (other / "torch" / "__init__.py").write_text(OTHER_TORCH.format(folder=str(other)))
    with started(tmp_path, 0, [CHECKOUT]) as theirs:
        theirs.add_worker(path=[other, CHECKOUT])
        theirs.add_worker(n_threads=4)
        with Client(theirs.address) as plain:
            plain.wait_for_workers(2, timeout=60)
            plain.run(exec, "import torch; torch.set_num_threads(300)")
        patient = Patient({"address": theirs.address, "n_workers": 2})
        try:
            findings = dict(examine(patient, "GLM"))
            larger = "from gan_lib.doctor import cluster; cluster.CPU_COUNT = 1200"
            patient.opened().run(exec, larger)
            ((_, idle),) = examine(patient, "M")
        finally:
            patient.close()
    assert "threads of torch that leave half of 1200 cores idle on tcp" in idle.found
    assert findings["G"].verdict == "ok", findings["G"]
    assert findings["L"].verdict == "fault"
    for torch_version in (torch.__version__, "2.11.0"):
        assert f"{torch_version} on tcp://" in findings["L"].found
    assert "requirements.lock" in findings["L"].cure
    assert findings["M"].verdict == "warning"
    for odd in ("4 threads on tcp", "no nanny on", "600 threads of torch on"):
        assert odd in findings["M"].found
    assert "--nthreads 1 --nanny --memory-limit 0" in findings["M"].cure


def test_a_store_whose_clock_is_another(
    client: Client, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = f"{s3}/run"
    assert found("clock", client, run=run).verdict == "ok"
    port = urlsplit(os.environ["AWS_ENDPOINT_URL"]).port
    assert port is not None
    with fault_proxy(port) as proxy:
        proxy.faults["*"] = "late"
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        S3FileSystem.clear_instance_cache()  # opened in another environment
        skewed = found("clock", client, run=f"{run}/other")
    S3FileSystem.clear_instance_cache()
    assert skewed.verdict == "fault"
    # A second may pass meanwhile.
    assert re.search(r"this machine is 120[0-2] s ahead of the store's clock", skewed.found)
    assert "worker" not in skewed.found  # theirs is another way there
    assert "timedatectl" in skewed.cure


def test_a_bucket_that_refuses_writes(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bucket").mkdir()
    monkeypatch.setenv("RCLONE_READ_ONLY", "true")
    with serve_s3(tmp_path):
        refused = found("run directory", client, run="s3://bucket/run")
    assert refused.verdict == "fault"
    assert refused.found.startswith("s3://bucket/run cannot be used from here: ")


def test_a_source_without_images(client: Client, tmp_path: Path) -> None:
    for n in range(12):
        (tmp_path / f"{n}.txt").write_text("no image")
    none = found("source", client, source=str(tmp_path))
    assert none.verdict == "fault"
    assert "none of the 12 files" in none.found
    assert "give a folder of images" in none.found


def test_a_kernel_of_another_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found("kernel").verdict == "ok"
    venv.create(tmp_path / "other", symlinks=True)
    python = str(tmp_path / "other" / "bin" / "python")
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": [python, "-m", "ipykernel_launcher"], "display_name": ""}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    other = found("kernel")
    assert other.verdict == "fault"
    assert f"{spec.parent} runs {python}" in other.found
    assert "ipykernel install" in other.cure


@pytest.mark.long
def test_the_rank_that_is_missing_is_named(
    client: Client, tiny: TrainingParameters, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "SECONDS_TO_EXCHANGE", 3)
    # On a machine that is busy itself, importing torch may pass for silence.
    client.run(exec, "import gan_lib.jobs.rank_task")
    busy = sorted(client.nthreads())[1]
    free = Event("free", client=client)
    client.submit(lambda: Event("free").wait(300), workers=[busy], pure=False, key="busy")
    missing = found("all reduce", client, **tiny.to_dict())
    free.set()
    # Nobody else finds them busy.
    client.gather([client.submit(int, workers=[w], pure=False) for w in client.nthreads()])
    assert missing.verdict == "fault"
    assert f"rank 1 ({busy}) is missing: it did not begin" in missing.found
    assert "what else these workers do" in missing.cure


@pytest.fixture
def across(
    two_hosts: Hosts, tiny: TrainingParameters, tmp_path: Path
) -> Iterator[Callable[[], Patient]]:
    """Starts a worker on each of two hosts, for somebody to look at; their scheduler is here."""
    theirs = ForeignCluster(tmp_path, path=[CHECKOUT], host=two_hosts.here)
    told = tiny.to_dict() | {"address": theirs.address, "n_workers": 2}
    patient = Patient(told)

    def start() -> Patient:
        for host, address in enumerate(two_hosts.addresses):
            theirs.add_worker(host=address, inside=two_hosts.inside(host))
        with Client(theirs.address) as plain:
            plain.wait_for_workers(2, timeout=200)
        return patient

    yield start
    patient.close()
    theirs.kill()


# What a firewall does that lets Dask's ports through and no others.
FIREWALL = """
table inet firewall {{
  chain in {{ type filter hook input priority 0; {closed} drop; }}
  chain out {{ type filter hook output priority 0; {closed} drop; }}
}}
"""


@pytest.mark.long
def test_two_hosts_between_which_ports_are_closed(
    two_hosts: Hosts, across: Callable[[], Patient], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shutil.which("nft"):
        pytest.skip("a firewall needs nftables")
    patient = across()
    open_ = dict(examine(patient, "GLRS"))
    one, other = sorted(patient.opened().nthreads())
    known = [address.rpartition(":")[2] for address in (patient.address, one, other)]
    closed_ports = f"tcp dport != {{ {', '.join(known)} }} tcp flags & (syn|ack) == syn"
    subprocess.run(
        [*two_hosts.inside(1), "nft", "-f", "-"],
        input=FIREWALL.format(closed=closed_ports), text=True, check=True,
    )  # fmt: skip
    monkeypatch.setattr(network, "SECONDS_TO_EXCHANGE", 20)
    closed = dict(examine(patient, "RS"))
    assert {finding.verdict for finding in open_.values()} == {"ok"}, open_
    assert f"by {INTERFACE}" in open_["R"].found
    assert "2 ranks, gloo" in open_["S"].found
    assert f"{one} does not reach {other} (port " in closed["R"].found
    assert f"{other} does not reach {one} (port " in closed["R"].found
    assert "large" not in closed["R"].found
    missing = f"rank 1 ({other}) is missing: it does not reach rank 0 on {two_hosts.addresses[0]}"
    assert closed["S"].found == missing
    assert "on all TCP ports" in closed["R"].cure


@pytest.mark.long
def test_two_hosts_with_larger_packets_than_pass_between_them(
    two_hosts: Hosts, across: Callable[[], Patient]
) -> None:
    for host in range(2):
        # One at a time, as they leave a real network card: Linux would hand on many as one.
        large = f"ip link set {INTERFACE} mtu 9000 gso_max_segs 1"
        subprocess.run([*two_hosts.inside(host), *large.split()], check=True)
    patient = across()
    findings = dict(examine(patient, "GRS"))
    assert findings["G"].verdict == "ok"  # the scheduler's own packets are small
    one, other = sorted(patient.opened().nthreads())
    assert findings["R"].verdict == "fault"
    assert f"{one} does not reach {other} (port " in findings["R"].found
    assert "small packets arrive, and large ones do not" in findings["R"].found
    assert f"the MTU is 9000 on {INTERFACE} of {one}, 9000 on " in findings["R"].found
    assert "same MTU" in findings["R"].cure
    assert findings["S"].verdict == "fault"
    assert "MTU" in findings["S"].cure, findings["S"].found


class Seen(Patient):
    """Workers with GPUs that are not there."""

    def on_workers(self, function: Any, *arguments: Any) -> dict[str, Any]:
        seen = (["a"], ["a"]) if self.n_workers == 2 else (["a"], [])
        return {f"tcp://10.0.0.{i}:1": gpus for i, gpus in enumerate(seen)}


def test_gpus_that_are_shared_or_missing() -> None:
    shared = find(CHECKS["N"], Seen({"n_workers": 2}))
    assert (shared.verdict, shared.found) == ("warning", "2 workers share the GPU a")
    assert "CUDA_VISIBLE_DEVICES=0" in shared.cure
    missing = find(CHECKS["N"], Seen({"device": "cuda"}))
    assert (missing.verdict, missing.found) == ("fault", "no GPU on tcp://10.0.0.1:1")
    if not torch.cuda.is_available():
        assert found("gpu", device="cuda").verdict == "fault"


def test_a_check_that_fails_or_hangs_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(patient: Patient) -> Finding:
        raise KeyError("nz")

    def hangs(patient: Patient) -> Finding:
        time.sleep(5)
        return ok("late")

    monkeypatch.setitem(CHECKS, "B", Check(fails))
    monkeypatch.setitem(CHECKS, "C", Check(hangs, 0.1))
    findings = dict(examine(Patient({}), "BCRD"))
    assert findings["B"].found == "the check itself failed: KeyError: 'nz'"
    assert findings["C"].found == "no answer within 0 s"
    assert findings["R"].found == "there is no cluster to ask"
    assert findings["D"].verdict == "ok"
    assert code_of(findings) == "C-B"


def test_a_code_says_what_it_means(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain("OK") == ["all is well"]
    assert [line.split()[:4] for line in explain("dk-m")] == [
        ["D", "fault", "machine", "disk:"],
        ["K", "fault", "machine", "bfloat16:"],
        ["M", "warning", "cluster", "workers:"],
    ]
    with pytest.raises(ParameterError, match="the code is '1!': expected OK or some of ABC"):
        explain("1!")
    assert main(["doctor", "--code", "D"]) == 0
    assert "room for the run" in capsys.readouterr().out
    assert main(["doctor", "--profile", "none"]) == 2


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    assert "python -m gan_lib doctor --profile dogs -p address" in capsys.readouterr().out


@pytest.mark.long
def test_a_healthy_machine_from_the_shell(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gan_lib", "doctor", "--profile", "tiny", "--json"]
    told = ["-p", "run", str(tmp_path / "run")]
    done = subprocess.run([*command, *told], capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert said["code"] == "OK"
    assert [f["letter"] for f in said["findings"]] == list(CHECKS)
    nowhere = ["-p", "source", str(tmp_path / "nowhere"), "-p", "address", "tcp://127.0.0.1:1"]
    done = subprocess.run([*command[:-1], *nowhere], capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 1
    assert "no Dask scheduler answers at 'tcp://127.0.0.1:1'" in " ".join(done.stdout.split())
    assert "code: GW " in done.stdout
