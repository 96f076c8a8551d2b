"""Parallel GAN training on a Dask cluster, in pieces small enough to read.

The way through: parameters and manifest -> images -> batches -> training
(models) -> results -> plots; `cluster` carries `training` to the workers.
"""

__version__ = "0.1.0"
