"""Attention of packed rows behind the one mask rule: ``api.attend``.

Implementations: ``reference`` (dense), ``blockwise`` (XLA, skips what nobody sees), ``cudnn`` (GPU), ``splash`` (TPU).
Each is a function of (query, key, value, visible) that JAX can differentiate in reverse mode.
"""
