"""hidden x head -> log-prob, entropy and self-certainty of every token, without the logits of all tokens at once."""

from kernels.log_prob.api import log_prob, token_stats

__all__ = ["log_prob", "token_stats"]
