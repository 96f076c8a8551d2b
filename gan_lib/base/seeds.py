"""Seeds that are functions of where in a run something is drawn, so that nobody has to remember."""

from __future__ import annotations

import numpy as np

# One stream of random numbers for each purpose, so that switching one of them
# off leaves the others as they were.
ORDER, FLIPS, PIXEL_NOISE, LATENTS, SAMPLES, WEIGHTS, COLOURS, AUGMENTATION, CLASSES = range(9)


def stream_seed(seed: int, purpose: int, *position: int) -> int:
    """A seed for one purpose at one position (epoch, step, rank), unrelated to all others."""
    state = np.random.SeedSequence((seed, purpose, *position)).generate_state(1, np.uint64)
    return int(state[0])
