"""This process among the ranks of its job, as torch.distributed knows them.

Alone, without torch.distributed, it is rank 0 of 1, and everything here does
nothing: so the same training function runs both ways.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import shutil
import sysconfig
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# DDP imports this when it is first built. Imported while a process group exists, it holds on to
# the group, and with it to the port where the ranks met, for as long as the process lives.
import torch._dynamo
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817

from gan_lib.base.errors import ParameterError, ReplicaError
from gan_lib.base.weights import weights_checksum
from gan_lib.gan.steps import unwrap
from gan_lib.parameters import TrainingParameters

# Names the attempt of a supervised job that this process is a rank of: JOB-RESTARTS-ATTEMPT.
ATTEMPT_VARIABLE = "GAN_LIB_ATTEMPT"
# Set when nobody waits any more for what this process's rank does: it should keep what it has
# and end.
LEAVE = threading.Event()
# Set when the worker of this process's rank is to end, and others may go on without it.
RETIRE = threading.Event()
# A collective that takes longer has lost a rank that Dask still hears of.
SECONDS_FOR_A_COLLECTIVE = 1800
# With fewer steps, the minutes that compiling takes on a GPU are not won back: reckoned from steps
# of 4 ms, and not measured.
STEPS_WORTH_COMPILING = 100_000
EMULATED = (
    "precision is bfloat16, but the hardware of some rank does not compute in it: it is emulated, "
    "up to a hundred times slower. Take auto or float32, in a new run"
)


class Ranks:
    """This process among the ranks of its job; of world size 1 without torch.distributed."""

    def __init__(self) -> None:
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in order, on every rank."""
        if not self.distributed:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, compute: Callable[[], Any]) -> Any:
        """What rank 0 computes, or raises, on every rank."""
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [compute()]
            except Exception as error:
                outcome = [error]
        if self.distributed:
            dist.broadcast_object_list(outcome, src=0)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    def require_equal(
        self,
        what: str,
        value: Any,
        cure: str = "every worker must read the same images and be told the same",
    ) -> None:
        """Compare a value over the ranks.

        Raises:
            ParameterError: naming the first rank that differs from rank 0.
        """
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ParameterError(f"{what} of rank {rank} differ from those of rank 0: {cure}")

    def require_equal_weights(self, networks: dict[str, nn.Module]) -> None:
        """Compare the weights and buffers of all ranks.

        Raises:
            ReplicaError: naming the first rank and tensor that differ from those of rank 0.
        """
        mine = {
            f"{name}.{key}": weights_checksum({key: value})
            for name, module in networks.items()
            for key, value in unwrap(module).state_dict().items()
        }
        first, *others = self.gather(mine)
        for rank, theirs in enumerate(others, 1):
            for name, checksum in theirs.items():
                if checksum != first[name]:
                    raise ReplicaError(
                        f"{name} of rank {rank} differs from that of rank 0: the ranks no longer "
                        "train the same networks (bad memory, another version of torch, or a "
                        "change that one rank made alone). The last checkpoint is from before"
                    )


def restarts_before(attempt: str) -> int:
    """How often a job had been started again when it made this attempt."""
    return int(attempt.split("-")[1]) if attempt else 0


def pick_device(wanted: str = "auto", local_rank: int | None = None) -> torch.device:
    """The device of this rank.

    Raises:
        ParameterError: if CUDA is wanted and this process sees no GPU.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ParameterError("device is 'cuda', but this process sees no GPU: use 'auto' or 'cpu'")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank is None:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    # NCCL and the gathering of objects use the current device.
    torch.cuda.set_device(device)
    # Some of cuDNN's ways add up in whatever order threads come by: a run that is resumed would
    # not be the same one. (Trying all of them out first, its `benchmark`, chooses by the clock.)
    torch.backends.cudnn.deterministic = True
    return device


def pick_precision(wanted: str, device: torch.device, ranks: Ranks) -> tuple[str, str]:
    """The precision of all ranks, and a warning if one of them would only emulate it."""
    # One for all: what one rank is slow with, the others wait for.
    speeds = set(ranks.gather(speed_of_bfloat16(device)))
    if wanted == "auto":
        wanted = "bfloat16" if speeds == {"faster"} else "float32"
    if wanted == "float32" or "emulated" not in speeds:
        return wanted, ""
    if ranks.rank == 0:
        warnings.warn(EMULATED, stacklevel=2)
    return wanted, EMULATED


def speed_of_bfloat16(device: torch.device) -> str:
    """Training in bfloat16 is "faster" than in float32 on the device, "slower", or "emulated".

    Measured with torch 2.14: 1.4 to 2.5 times as fast with AMX at 32 and 64 pixels (0.95 to 1.0
    times with 8 feature maps at 16 pixels), 0.8 to 0.9 times with AVX512-BF16 alone; emulated,
    0.4 times with AVX-512 and 0.01 times with AVX2.
    """
    if device.type == "cuda":
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
        return "faster" if has_it else "emulated"
    told: list[str] = []
    # torch 2.11 has no public way to ask.
    with contextlib.suppress(OSError):
        told = Path("/proc/cpuinfo").read_text().split()
    if "amx_bf16" in told:
        return "faster"
    return "slower" if not told or "avx512_bf16" in told or "bf16" in told else "emulated"


def check_machine(p: TrainingParameters) -> None:
    """Raise ParameterError for what is asked for and this machine cannot do."""
    gpu = p.device != "cpu" and torch.cuda.is_available()
    if p.sync_norm and not gpu:
        raise ParameterError(
            "sync_norm is True, and here is no GPU: torch computes BatchNorm over several ranks on "
            "GPUs alone. Set it to False, or use workers that have one"
        )
    if p.compile == "on" and not _has_compiler(gpu):
        raise ParameterError(
            "compile is 'on', and here is no compiler: install g++ (for a GPU gcc, and Python.h of "
            "this Python, which python3-dev brings), or set compile to 'off'"
        )


def pick_compile(p: TrainingParameters, ranks: Ranks, steps: int, before: bool | None) -> bool:
    """Whether the networks are compiled, on all ranks or on none; see `check_machine`.

    Args:
        p: where `compile` is "auto", they are on GPUs, if the run is long.
        ranks: of the run.
        steps: of the whole run.
        before: whether they were in the run that goes on; None if none does.
    """
    if p.compile != "auto" or p.r1 > 0 or p.sync_norm:
        return p.compile == "on"
    gpu = p.device != "cpu" and torch.cuda.is_available()
    worth_it = steps >= STEPS_WORTH_COMPILING if before is None else before
    return all(ranks.gather(gpu and _has_compiler(gpu))) and worth_it


def _has_compiler(gpu: bool) -> bool:
    # For a GPU, Triton compiles what calls its kernels with whatever C compiler there is, as an
    # extension of Python.
    told, usual = ("CC", ("gcc", "clang")) if gpu else ("CXX", ("g++", "clang++"))
    found = any(map(shutil.which, filter(None, (os.environ.get(told), *usual))))
    headers = sysconfig.get_path("include", "posix_prefix")
    return found and (not gpu or Path(headers, "Python.h").exists())


def distribute(module: nn.Module) -> DDP:
    """Wrap a network for training on all ranks: the one difference that DDP makes.

    Buffers are not exchanged in each forward pass: `train_gan` averages them once an epoch.
    """
    # torch 2.13 renamed the argument.
    names = inspect.signature(DDP.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    # Gradients lie where they are sent from: nothing is copied there and back.
    told: dict[str, Any] = {buffers: False}
    return DDP(module, gradient_as_bucket_view=True, **told)
