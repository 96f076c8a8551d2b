"""Parallel GAN training on a Dask cluster, in pieces small enough to read.

The way through: parameters and manifest -> images -> batches -> training
(models) -> results -> plots; `cluster` carries `training` to the workers.

    from gan_lib import TrainingParameters, launch, open_run, start_cluster
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# What most programs need, by the module that holds it. Imported when it is asked for:
# a check of parameters need not wait for torch, nor a training on one machine for Dask.
_HOME = {
    "TrainingParameters": "parameters",
    "prepare_images": "images",
    "Generator": "models",
    "Discriminator": "models",
    "train_gan": "training",
    "start_cluster": "cluster",
    "connect": "cluster",
    "close_cluster": "cluster",
    "launch": "cluster",
    "run_ranks": "cluster",
    "open_run": "results",
    "DaskResultsHandler": "results_handler",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
