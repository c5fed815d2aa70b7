"""The types of arguments that several ops share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np
from torch import Tensor

Backend: TypeAlias = Literal["auto", "reference", "triton", "native"]
"""Which implementation runs an op; ``"auto"`` takes the fastest that is available for device and dtype."""

Metric: TypeAlias = Literal["cosine", "dot", "euclidean"]
"""How residual quantization compares a residual with a code: scaled cosine, inner product, or squared distance."""

Mode: TypeAlias = Literal["soft", "straight_through", "hard", "rotation"]
"""What residual quantization emits at each level: a mixture, a sampled row with the soft gradient, or the best row
without a gradient or with that of a rotation."""

Reduction: TypeAlias = Literal["none", "mean", "sum"]
"""What a loss does with the losses of its rows, as in ``F.cross_entropy``."""

Normalize: TypeAlias = Literal["full", "children", "none"]
"""What a beam step subtracts from logits: log-sum-exp over the codebook, over the allowed children, or nothing."""

Order: TypeAlias = Literal["lexicographic", "sum"]
"""What items are ranked by: beam score and then cosine, or their weighted sum."""

Rows: TypeAlias = Literal["replicated", "sharded"]
"""Whether the rows of a vocabulary-parallel loss are the same on all ranks, or each rank has different ones."""

IntegersLike: TypeAlias = Tensor | np.ndarray | Sequence[int] | Sequence[Sequence[int]]
"""Integers as a tensor, a NumPy array, or (nested) sequences."""
