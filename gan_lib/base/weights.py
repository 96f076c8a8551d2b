"""A name for what networks hold."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def weights_checksum(*states: Mapping[str, Tensor]) -> str:
    """SHA-256 of all weights and buffers: equal where training left equal replicas."""
    digest = hashlib.sha256()
    for name, value in chain.from_iterable(state.items() for state in states):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
