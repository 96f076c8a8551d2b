"""Names of a package that are imported when somebody asks for them."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any


def lazily(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose `__init__` imports nothing.

    What is written there `if TYPE_CHECKING`, as `from module import name as name`, is done when
    somebody asks for the name: a check of parameters need not wait for torch, nor a training on
    one machine for Dask.
    """
    told = ast.parse(inspect.getsource(sys.modules[package]))
    imports = [node for node in ast.walk(told) if isinstance(node, ast.ImportFrom)]
    homes = {a.asname: str(node.module) for node in imports for a in node.names if a.asname}

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return find, lambda: sorted(homes), [*homes]
