"""How long the optimisers' steps are: learning rates as a function of where the run is."""

from __future__ import annotations

import math

from gan_lib.parameters import TrainingParameters


def rate_factor(p: TrainingParameters, seen: int) -> float:
    """What `lr_g` and `lr_d` are multiplied by in the step that follows `seen` images.

    Three factors, each 1 unless it is asked for:

    - With more images in a step its direction is surer, and it may be longer: with Adam as the
      square root of `batch_size / lr_batch` (Malladi et al. 2022, arXiv:2205.10287, section 4).
    - What Adam divides by is a guess at first: over `lr_warmup` images the rates rise in equal
      steps (Goyal et al. 2017, arXiv:1706.02677, section 2.2).
    - At last long steps only lead around the aim: after `lr_hold` images the rates fall, by half
      in each `lr_half_life` images.
    """
    factor = math.sqrt(p.batch_size / p.lr_batch) if p.lr_batch else 1.0
    if seen < p.lr_warmup:
        factor *= min(1.0, (seen + p.batch_size) / p.lr_warmup)
    if p.lr_half_life:
        factor *= 0.5 ** (max(0, seen - p.lr_hold) / p.lr_half_life)
    return factor
