"""How is a training carried to a cluster and left alone there?

Launched, watched over, started again where it was interrupted. Told by notebook 04.
"""

from typing import TYPE_CHECKING

from gan_lib.base.lazy import lazily

if TYPE_CHECKING:
    from gan_lib.jobs.job import Job as Job
    from gan_lib.jobs.launching import launch as launch
    from gan_lib.jobs.launching import run_ranks as run_ranks
    from gan_lib.jobs.results_handler import DaskResultsHandler as DaskResultsHandler
    from gan_lib.jobs.sweeping import sweep as sweep

__getattr__, __dir__, __all__ = lazily(__name__)
