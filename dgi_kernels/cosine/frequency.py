"""How often items occur in batches, learnt from the stream of batches: what the logQ correction needs.

Algorithm 2 of Yi et al., *Sampling-Bias-Corrected Neural Modeling for Large Corpus Item Recommendations* (RecSys 2019):
two arrays hold, for every bucket of a hash, the step A at which one of its items occurred last, and a moving average B
of the number of steps between two occurrences,

    B <- (1 - a) B + a (t - A),    A <- t,    q = 1 / B.

Items that share a bucket seem more frequent than they are; of several hashes the longest interval is nearest the truth.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dgi_kernels import checks
from dgi_kernels.collectives import Group, all_gather, world_size

# Odd multipliers of 64 bits: those of SplitMix64, and the golden ratio.
_MULTIPLIERS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)


class FrequencyEstimator(nn.Module):
    """Log probabilities that items occur in a batch, estimated while training, in a memory that does not grow.

    Args:
        buckets: size H of the arrays; several times the number of items that matter.
        hashes: how many arrays, each with a hash of its own.
        rate: weight a of the newest interval, in (0, 1]; small is accurate, large is quick to follow a change.
        initial_interval: steps that every item is taken to be apart until it occurs, at least 1.
        group: processes whose batches count together as one; None for all.

    Attributes:
        step: () int64 buffer, batches seen.
        last_step: (hashes, H) int64 buffer, A.
        interval: (hashes, H) float32 buffer, B.

    Raises:
        ValueError: a size or ``rate`` is out of range.
        TypeError: an argument has the wrong type.

    Examples:
        >>> estimator = dgi_kernels.FrequencyEstimator(1024, initial_interval=1.0)
        >>> for step in range(200):
        ...     ids = torch.tensor([7, 8]) if step % 2 else torch.tensor([7])
        ...     log_q = estimator(ids)
        >>> [round(q, 2) for q in estimator.log_q(torch.tensor([7, 8])).exp().tolist()]
        [1.0, 0.5]
    """

    step: Tensor
    last_step: Tensor
    interval: Tensor

    def __init__(
        self,
        buckets: int = 1 << 20,
        *,
        hashes: int = 2,
        rate: float = 0.05,
        initial_interval: float = 100.0,
        group: Group = None,
    ) -> None:
        super().__init__()
        checks.integer("buckets", buckets, low=1)
        checks.integer("hashes", hashes, low=1)
        self.rate = checks.number("rate", rate, positive=True, low=0.0, high=1.0)
        initial_interval = checks.number("initial_interval", initial_interval, low=1.0, high=2.0**63)
        self.group = group
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last_step", torch.zeros(hashes, buckets, dtype=torch.int64))
        self.register_buffer("interval", torch.full((hashes, buckets), initial_interval))

    def forward(self, ids: Tensor) -> Tensor:
        """Count a batch's ``ids`` (...) while training, then return :meth:`log_q` of them."""
        if self.training:
            self.update(ids)
        return self.log_q(ids)

    @torch.no_grad()
    def update(self, ids: Tensor) -> None:
        """Count one step with the items ``ids`` (...), of all processes together; twice in one batch counts once."""
        ids = self._checked(ids)
        if world_size(self.group) > 1:
            ids = all_gather(ids, self.group)
        self.step += 1
        bucket = self._buckets(ids)
        # Items that share a bucket all write the same numbers, those that follow from what was there before.
        gap = (self.step - self.last_step.gather(1, bucket)).to(self.interval.dtype)
        before = self.interval.gather(1, bucket)
        self.interval.scatter_(1, bucket, before + self.rate * (gap - before))
        self.last_step.scatter_(1, bucket, self.step.expand_as(bucket))

    @torch.no_grad()
    def log_q(self, ids: Tensor) -> Tensor:
        """(...) float32: the log of the estimated probability that a batch holds each item."""
        interval = self.interval.gather(1, self._buckets(self._checked(ids))).amax(0)
        return -interval.clamp(min=1.0).log().reshape(ids.shape)

    def _checked(self, ids: Tensor) -> Tensor:
        return checks.tensor("ids", ids, dtypes=checks.INDEX_DTYPES, like=self.interval).long().flatten()

    def _buckets(self, ids: Tensor) -> Tensor:
        """(hashes, N) a bucket of every id."""
        rows = []
        for row in range(self.interval.shape[0]):
            x = ids + row
            for multiplier in _MULTIPLIERS:
                x = x * multiplier
                x = x ^ ((x >> 29) & 0x7FFFFFFFF)
            rows.append((x & 0x7FFFFFFFFFFFFFFF) % self.interval.shape[1])
        return torch.stack(rows)

    def extra_repr(self) -> str:
        hashes, buckets = self.interval.shape
        return f"buckets={buckets}, hashes={hashes}, rate={self.rate}"
