"""Parallel GAN training on a Dask cluster, in rooms small enough to read.

From the top; each imports only those below it:

    cli         what can be done from a shell
    doctor      what does not work here, and how it is mended
    jobs        a training left alone on a cluster
    training    one rank's work
    results     what comes back
    quality     how good the pictures are, and whether they are new
    gan         the two networks, and what a step teaches them
    practice    things to try it on
    data        files -> arrays -> batches
    cluster     Dask: started or joined
    sources     places, and the bytes that lie there
    parameters  what a run is told
    base        errors, folders, progress, seeds

    from gan_lib import TrainingParameters, launch, open_run, start_cluster
"""

from typing import TYPE_CHECKING

from gan_lib.base.lazy import lazily

if TYPE_CHECKING:
    from gan_lib.cluster.starting import close_cluster as close_cluster
    from gan_lib.cluster.starting import connect as connect
    from gan_lib.cluster.starting import start_cluster as start_cluster
    from gan_lib.data.images import prepare_images as prepare_images
    from gan_lib.gan.models import Discriminator as Discriminator
    from gan_lib.gan.models import Generator as Generator
    from gan_lib.jobs.launching import launch as launch
    from gan_lib.jobs.launching import run_ranks as run_ranks
    from gan_lib.jobs.results_handler import DaskResultsHandler as DaskResultsHandler
    from gan_lib.jobs.sweeping import sweep as sweep
    from gan_lib.parameters import TrainingParameters as TrainingParameters
    from gan_lib.results.run import open_run as open_run
    from gan_lib.results.sweep import Sweep as Sweep
    from gan_lib.training.rank import train_gan as train_gan

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazily(__name__)
