"""What is a GAN, and what does one step teach it?

Two networks, noise to image and image to score, and
the two halves of a step; they know nothing of runs, files or clusters. Told by notebook 02.
"""

from typing import TYPE_CHECKING

from gan_lib.base.lazy import lazily

if TYPE_CHECKING:
    from gan_lib.gan.models import Discriminator as Discriminator
    from gan_lib.gan.models import Generator as Generator
    from gan_lib.gan.steps import Lesson as Lesson
    from gan_lib.gan.steps import discriminator_step as discriminator_step
    from gan_lib.gan.steps import generator_step as generator_step

__getattr__, __dir__, __all__ = lazily(__name__)
