"""A step that is taken late: when the gradients of all ranks are there, and they are needed."""

# No annotations from the future here: DDP reads those of its hook, and wants types.

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # exported, untold
from torch.nn.parallel import DistributedDataParallel as DDP  # noqa: N817
from torch.profiler import record_function

# What a profiler sees of a rank that waits for its gradients.
WAIT = "wait for gradients"


class LateStep:
    """An optimiser whose step is taken by `finish`, and not by `step`.

    DDP waits at the end of `backward` until the gradients of all ranks have been exchanged. Those
    of the generator are needed when it next makes images, and before that, the discriminator looks
    at real ones: so they travel meanwhile, and a rank that is a little late keeps nobody waiting.
    What is computed is the same, to the bit.

    Args:
        optimizer: torch's.
        module: what it trains. If that is in DDP, its gradients are exchanged here.
        exchange: what the gradients travel as, "float32" (as they are) or "bfloat16".
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, module: nn.Module, exchange: str = "float32"
    ) -> None:
        self.optimizer = optimizer
        self.exchange = exchange
        # On their way: what to wait for, what travels, and where DDP has the gradients.
        self._sent: list[tuple[dist.Work, Tensor, Tensor]] = []
        if isinstance(module, DDP):
            module.register_comm_hook(None, self._send)

    def _send(self, _: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """DDP calls this when the gradients of a bucket are complete on this rank."""
        gradients = bucket.buffer()
        half = self.exchange == "bfloat16"
        # The mean, as DDP's own exchange finds it: divided first, then added up.
        travelling = (gradients.bfloat16() if half else gradients).div_(dist.get_world_size())
        work = dist.all_reduce(travelling, async_op=True)
        assert work is not None
        self._sent.append((work, travelling, gradients))
        # DDP is told that all is done: the gradients are where they will be.
        gpus: list[int | str | torch.device] = [gradients.device] if gradients.is_cuda else []
        done: torch.futures.Future[Tensor] = torch.futures.Future(devices=gpus)
        done.set_result(gradients)
        return done

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the last gradients."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """Nothing yet: see `finish`."""

    def finish(self) -> None:
        """Wait for the gradients, and take the step."""
        if self._sent:
            with record_function(WAIT):
                for work, travelling, gradients in self._sent:
                    work.wait()
                    if travelling is not gradients:
                        gradients.copy_(travelling)
            self._sent.clear()
        self.optimizer.step()
