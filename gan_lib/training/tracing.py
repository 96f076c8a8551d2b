"""What one rank does during two steps, as torch's profiler sees it."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator

from torch.autograd.profiler_util import FunctionEvent, Interval
from torch.profiler import ProfilerActivity, profile, record_function

from gan_lib.base.memory import keep_freed_memory
from gan_lib.data.batches import Batches
from gan_lib.data.datasets import training_images
from gan_lib.parameters import TrainingParameters
from gan_lib.results.timeline import Span
from gan_lib.training.joint import SEND, WAIT
from gan_lib.training.networks import Training
from gan_lib.training.ranks import Ranks, pick_device

MARK = "the steps"
# With a second one, what is still on its way after the first is seen to arrive.
STEPS = 2


def trace_steps(parameters: TrainingParameters, warm_up: int = 8) -> list[Span]:
    """Train a few steps, and look at the last two: for `run_ranks`, on each rank.

    Clocks of several machines differ by more than a step takes: their ranks' parts are right,
    but not how they lie to each other. On a GPU it shows when work is asked for, not done.

    Args:
        parameters: of the training; nothing of it is kept.
        warm_up: steps before those.

    Returns:
        What the two are made of, see `Span`; drawn by `gan_lib.results.timeline.plot_timeline`.
    """
    keep_freed_memory()
    ranks = Ranks()
    device = pick_device(parameters.device)
    images = training_images(parameters, None, False, progress=False)
    training = Training(parameters, ranks, device)
    batches = Batches(images, parameters, ranks.rank, ranks.world_size, device)
    steps = (batch for epoch in range(1, warm_up + STEPS + 2) for batch in batches.epoch(epoch))
    for _ in range(warm_up):
        training.step(next(steps))
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU]):
        pass
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        ranks.gather(None)  # begin together
        training.step(next(steps))  # the first one takes longer
        began = time.time()
        with record_function(MARK):
            for _ in range(STEPS):
                training.step(next(steps))
        training.finish()
    spans = _spans(list(profiler.events() or ()))
    first = min(ranks.gather(began))
    return [Span(s.kind, began - first + s.start, began - first + s.end) for s in spans]


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Inside, nothing of this process reaches stderr.

    When torch's profiler is first used in another thread than torch was imported in, as in a
    Dask task, it calls that an error, past KINETO_LOG_LEVEL and Python; nothing comes of it.
    """
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _spans(events: list[FunctionEvent]) -> list[Span]:
    """Of one rank, in seconds since its steps began."""
    (mark,) = (event for event in events if event.name == MARK and not event.is_async)
    zero, end = mark.time_range.start, mark.time_range.end

    def span(kind: str, start: float, end: float) -> Span:
        return Span(kind, (start - zero) / 1e6, (end - zero) / 1e6)

    # What gloo does in threads of its own; and what goes through shared memory, where there is
    # nothing to be seen between the moment that it is written and the one that all is there.
    sent = [e.time_range for e in events if e.name.startswith(("gloo:", "nccl:"))]
    ends = sorted(e.time_range.end for e in events if e.name == WAIT)
    for start in (e.time_range.start for e in events if e.name == SEND):
        sent.append(Interval(start, next((e for e in ends if e > start), end)))
    sent = [s for s in sent if s.end > zero and s.start < end]
    found = [span("exchange", max(s.start, zero), min(s.end, end)) for s in sent]
    now = zero
    done = sorted(mark.cpu_children, key=lambda event: event.time_range.start)
    for event in (*done, None):
        start = event.time_range.start if event else end
        # Between two operations: the rank waits for an exchange that ends here.
        ended = [s for s in sent if now < s.end <= start]
        changes = {max(t, now) for s in ended for t in (s.start, s.end)}
        for moment in sorted(changes | {start}):
            if moment > now:
                waits = any(s.start <= now < s.end for s in ended)
                found.append(span("waiting" if waits else "Python", now, moment))
                now = moment
        if event:
            found.append(span(_kind(event.name), start, event.time_range.end))
            now = event.time_range.end
    return found


def _kind(name: str) -> str:
    if name == WAIT:
        return "waiting"
    if name.startswith("autograd::"):
        return "backward"
    return "optimiser" if name.startswith("Optimizer.") else "forward"
