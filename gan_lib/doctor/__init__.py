"""What does not work here, and how is it mended?

Machine, cluster, network and storage tried out for one profile, before any time is spent.
"""

from typing import TYPE_CHECKING

from gan_lib.base.lazy import lazily

if TYPE_CHECKING:
    from gan_lib.doctor.examining import examine as examine
    from gan_lib.doctor.examining import explain as explain
    from gan_lib.doctor.finding import Finding as Finding
    from gan_lib.doctor.patient import Patient as Patient

__getattr__, __dir__, __all__ = lazily(__name__)
