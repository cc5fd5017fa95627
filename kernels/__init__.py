"""Numerical kernels of rlrag: per-token statistics over a vocabulary and credit over tokens; they know jax only."""
