"""The step of an optimiser that all ranks take together: with the mean of their gradients."""

# No annotations from the future here: DDP reads those of its hook, and wants types.

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # exported, untold
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817
from torch.profiler import record_function

from gan_lib.training.shared import share_sum

# What a profiler sees of a rank that hands on its gradients, and that waits for those of all.
SEND, WAIT = "send gradients", "wait for gradients"


class JointStep:
    """An optimiser whose step begins with the mean of all ranks' gradients.

    DDP alone would wait for them at the end of `backward`. The generator's are needed when it next
    makes images, and before that, the discriminator looks at real ones: so its step is taken late,
    the gradients travel meanwhile, and a rank that is a little behind keeps nobody waiting. What is
    computed is the same, to the bit.

    Ranks of one machine that train on its CPUs add up their gradients in memory that they share, if
    they can (see `share_sum`); all others send messages.

    Args:
        optimizer: torch's.
        module: what it trains. If that is in DDP, its gradients are exchanged here.
        exchange: what the gradients travel as, "float32" (as they are) or "bfloat16".
        late: whether the step is taken by `finish`, and not by `step`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        module: nn.Module,
        exchange: str = "float32",
        late: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.exchange = exchange
        self.late = late
        self._alone = not isinstance(module, DDP)
        # What waits for gradients that are on their way, and puts them where DDP has them.
        self._on_their_way: list[Callable[[], None]] = []
        self._shared = None
        if isinstance(module, DDP):
            if exchange == "float32":
                self._shared = share_sum([w for w in module.parameters() if w.requires_grad])
            module.register_comm_hook(None, self._send)

    def _send(self, _: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """DDP calls this when the gradients of a bucket are complete on this rank."""
        gradients = bucket.buffer()
        if self._shared:
            with record_function(SEND):
                receive = self._shared.send(gradients, last=bucket.is_last())
        else:
            receive = self._send_message(gradients)
        self._on_their_way.append(receive)
        # DDP is told that all is done: the gradients are where they will be.
        gpus: list[int | str | torch.device] = [gradients.device] if gradients.is_cuda else []
        done: torch.futures.Future[Tensor] = torch.futures.Future(devices=gpus)
        done.set_result(gradients)
        return done

    def _send_message(self, gradients: Tensor) -> Callable[[], None]:
        half = self.exchange == "bfloat16"
        # The mean, as DDP's own exchange finds it: divided first, then added up.
        travelling = (gradients.bfloat16() if half else gradients).div_(dist.get_world_size())
        work = dist.all_reduce(travelling, async_op=True)
        assert work is not None

        def receive() -> None:
            work.wait()
            if travelling is not gradients:
                gradients.copy_(travelling)

        return receive

    def mean(self, values: Tensor) -> Tensor:
        """The mean of something else over all ranks, on every rank, while no gradients travel."""
        assert not self._on_their_way
        if self._alone:
            return values
        mean = values.flatten().clone()
        if self._shared and self._shared.holds(mean):
            self._shared.send(mean, last=True)()
        else:
            dist.all_reduce(mean.div_(dist.get_world_size()))
        return mean.view_as(values)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the last gradients."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """Take the step, unless it is taken late: see `finish`."""
        if not self.late:
            self.finish()

    def finish(self) -> None:
        """Wait for the gradients, and take the step."""
        if self._on_their_way:
            with record_function(WAIT):
                for receive in self._on_their_way:
                    receive()
            self._on_their_way.clear()
        self.optimizer.step()
