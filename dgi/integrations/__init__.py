"""DGI's parts inside other people's code: Hugging Face ``generate``, and drop-ins for common building blocks.

The names below are imported when first used.  Those for Hugging Face, and the masks, need the package transformers:
``pip install 'dgi-kernels[hf]'``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgi.integrations.beam_adapters import GridBeamSearch, RqVaeGeneration, SidGrBeamSearch, extend_beams
    from dgi.integrations.custom_generate import TrieSearch
    from dgi.integrations.generation import ConstrainedGeneration, constrained_generate
    from dgi.integrations.mask_adapters import (
        ConstrainedLogitsProcessor,
        TrieItemMaskProvider,
        prefix_allowed_tokens_fn,
    )
    from dgi.integrations.patches import gumbel_softmax_patch, residual_quantizer_from
    from dgi.integrations.processor import TrieLogitsProcessor
    from dgi.integrations.ray_data import CodesOfItems

_MODULE_OF = {
    "CodesOfItems": "ray_data",
    "ConstrainedGeneration": "generation",
    "ConstrainedLogitsProcessor": "mask_adapters",
    "GridBeamSearch": "beam_adapters",
    "RqVaeGeneration": "beam_adapters",
    "SidGrBeamSearch": "beam_adapters",
    "TrieItemMaskProvider": "mask_adapters",
    "TrieLogitsProcessor": "processor",
    "TrieSearch": "custom_generate",
    "constrained_generate": "generation",
    "extend_beams": "beam_adapters",
    "gumbel_softmax_patch": "patches",
    "prefix_allowed_tokens_fn": "mask_adapters",
    "residual_quantizer_from": "patches",
}

__all__ = [
    "CodesOfItems",
    "ConstrainedGeneration",
    "ConstrainedLogitsProcessor",
    "GridBeamSearch",
    "RqVaeGeneration",
    "SidGrBeamSearch",
    "TrieItemMaskProvider",
    "TrieLogitsProcessor",
    "TrieSearch",
    "constrained_generate",
    "extend_beams",
    "gumbel_softmax_patch",
    "prefix_allowed_tokens_fn",
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
