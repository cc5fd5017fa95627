"""Decode logits -> sampled token, its log-prob, entropy, self-certainty and top-2 margin, in one read."""

from kernels.uncertainty.api import Sampled, sample
from kernels.uncertainty.filters import Filters

__all__ = ["Filters", "Sampled", "sample"]
