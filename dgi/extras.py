"""Packages that come with an extra of this distribution: the ops need none of them."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str = "model") -> Any:
    """Import ``module``.

    Raises:
        ModuleNotFoundError: its package is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # it is there; something that it needs is not
        raise ModuleNotFoundError(
            f"this needs the package {package}; run: pip install 'dgi-kernels[{extra}]'", name=error.name
        ) from None
