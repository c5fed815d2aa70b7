"""Progress of long work; see :mod:`dgi_kernels.progress`."""

from dgi_kernels.progress import LONGEST, QUIET, Progress

__all__ = ["LONGEST", "QUIET", "Progress"]
