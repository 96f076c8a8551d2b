"""Where the time of a step goes, on each rank."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import pytest
from distributed import Client

from gan_lib.jobs.launching import run_ranks
from gan_lib.parameters import TrainingParameters
from gan_lib.results.timeline import Span, plot_timeline, seconds_by_kind
from gan_lib.training.tracing import trace_steps


def without_gaps(spans: list[Span]) -> tuple[float, float]:
    """When a rank's own parts begin and end, once each begins where the one before ended."""
    own = sorted((s for s in spans if s.kind != "exchange"), key=lambda s: s.start)
    for one, other in pairwise(own):
        assert other.start == pytest.approx(one.end, abs=1e-6)
    return own[0].start, own[-1].end


def test_a_step_alone_has_no_exchange(tiny: TrainingParameters) -> None:
    spans = trace_steps(tiny, warm_up=1)
    start, end = without_gaps(spans)
    parts = seconds_by_kind(spans)
    assert parts["exchange"] == parts["waiting"] == start == 0
    assert min(parts[kind] for kind in ("forward", "backward", "optimiser", "Python")) > 0
    assert sum(parts.values()) == pytest.approx(end)


IN_A_THREAD = """
import threading
from gan_lib.parameters import TrainingParameters
from gan_lib.training.tracing import trace_steps

told = TrainingParameters(image_size=16, channels=1, max_images=96, ngf=8, ndf=8, batch_size=32)
thread = threading.Thread(target=trace_steps, args=(told, 1))
thread.start()
thread.join()
"""


def test_the_profiler_reports_no_errors_that_are_none() -> None:
    quiet = os.environ | {"KINETO_LOG_LEVEL": "6"}  # as workers have it
    ended = subprocess.run(
        [sys.executable, "-c", IN_A_THREAD], env=quiet, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_step_of_two_ranks_shows_what_they_exchange(
    client: Client, tiny: TrainingParameters
) -> None:
    traces = run_ranks(client, trace_steps, device="cpu", parameters=tiny)
    assert min(without_gaps(spans)[0] for spans in traces) == 0
    found = []
    for spans in traces:
        begin, _ = without_gaps(spans)
        # What is on its way when a rank begins is of the step before.
        inside = [s for s in spans if s.kind == "exchange" and s.start > begin]
        inside.sort(key=lambda s: s.start)
        # In each step the discriminator's gradients and then the generator's, and none twice. Those
        # of the second generator's may begin only after the end.
        assert len(inside) in (3, 4)
        found.append(inside[:3])
    # Nobody has the sum before both have sent their part.
    for one, other in zip(*found, strict=True):
        assert min(one.end, other.end) > max(one.start, other.start), (one, other)
    axes = plot_timeline(traces).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rank 0", "rank 1"]
