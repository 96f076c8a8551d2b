"""Which workers are there, and do they run this very code?

A Dask cluster, started or joined; it knows nothing of training. Told by notebook 01.
"""

from typing import TYPE_CHECKING

from gan_lib.base.lazy import lazily

if TYPE_CHECKING:
    from gan_lib.cluster.shipping import ship_package as ship_package
    from gan_lib.cluster.starting import close_cluster as close_cluster
    from gan_lib.cluster.starting import connect as connect
    from gan_lib.cluster.starting import start_cluster as start_cluster
    from gan_lib.cluster.workers import find_places as find_places

__getattr__, __dir__, __all__ = lazily(__name__)
