"""Attention of one new token a slot over the pages of its stream."""

from kernels.decode_attention.api import decode_attention

__all__ = ["decode_attention"]
