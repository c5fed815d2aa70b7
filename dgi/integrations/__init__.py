"""DGI's parts inside other people's code: Hugging Face ``generate``, and drop-ins for common building blocks.

The names below are imported when first used.  Those for Hugging Face, the first three, need the package transformers:
``pip install 'dgi-kernels[hf]'``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgi.integrations.generation import ConstrainedGeneration, constrained_generate
    from dgi.integrations.patches import gumbel_softmax_patch, residual_quantizer_from
    from dgi.integrations.processor import TrieLogitsProcessor

_MODULE_OF = {
    "ConstrainedGeneration": "generation",
    "TrieLogitsProcessor": "processor",
    "constrained_generate": "generation",
    "gumbel_softmax_patch": "patches",
    "residual_quantizer_from": "patches",
}

__all__ = [
    "ConstrainedGeneration",
    "TrieLogitsProcessor",
    "constrained_generate",
    "gumbel_softmax_patch",
    "residual_quantizer_from",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        try:
            return getattr(importlib.import_module(f"dgi.integrations.{_MODULE_OF[name]}"), name)
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            raise ModuleNotFoundError(
                f"dgi.integrations.{name} needs the package transformers: pip install 'dgi-kernels[hf]' ({error})"
            ) from error
    raise AttributeError(f"module 'dgi.integrations' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
