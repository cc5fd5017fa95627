"""Decode logits -> log-prob of the sampled token, entropy, self-certainty and top-2 margin, in one read."""

from kernels.uncertainty.api import Uncertainty, uncertainty

__all__ = ["Uncertainty", "uncertainty"]
