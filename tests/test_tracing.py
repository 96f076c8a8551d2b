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
    found = [[s for s in spans if s.kind == "exchange"] for spans in traces]
    # In both steps the discriminator's gradients, and the generator's of the first. Those of the
    # step before and of the second may be seen as well.
    for one, other in zip(
        *(sorted(rank, key=lambda s: s.start)[-4:-1] for rank in found), strict=True
    ):
        # Nobody has the sum before both have sent their part.
        assert min(one.end, other.end) > max(one.start, other.start), (one, other)
    axes = plot_timeline(traces).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rank 0", "rank 1"]
