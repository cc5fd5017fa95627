"""Float64 NumPy definitions that the kernel tests compare with, written from the textbook and not from the kernels."""

from typing import NamedTuple

import numpy as np
import pytest


class Float64Stats(NamedTuple):
    lse: np.ndarray
    entropy: np.ndarray
    certainty: np.ndarray
    logits: np.ndarray


def float64_stats(logits, ids) -> Float64Stats:
    """Row by row, over the finite logits only; certainty is the sum over v of (1/n) log((1/n) / p_v)."""
    logits, ids = np.asarray(logits, np.float64), np.asarray(ids)
    flat, flat_ids = logits.reshape(-1, logits.shape[-1]), ids.reshape(-1, ids.shape[-1])
    rows = []
    for z, wanted in zip(flat, flat_ids):
        taken = [z[i] if 0 <= i < len(z) else -np.inf for i in wanted]
        z = z[z > -np.inf]
        if len(z) == 0:
            rows.append((-np.inf, 0.0, 0.0, taken))
            continue
        lse = z.max() + np.log(np.exp(z - z.max()).sum())
        log_p = z - lse
        entropy = -(np.exp(log_p) * log_p).sum()
        certainty = (np.log(1 / len(z)) - log_p).mean()
        rows.append((lse, entropy, certainty, taken))
    shape = logits.shape[:-1]
    columns = [np.array([row[i] for row in rows]) for i in range(4)]
    return Float64Stats(*(each.reshape(*shape, *each.shape[1:]) for each in columns))


@pytest.fixture
def expected_stats():
    """The function (logits, ids) -> lse, entropy, certainty, logits in float64."""
    return float64_stats


@pytest.fixture
def relative_error():
    """The function (got, wanted) -> norm of the difference divided by the norm of what was wanted."""

    def error(got, wanted) -> float:
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
        assert np.isfinite(got).all()
        return float(np.linalg.norm(got - wanted) / max(np.linalg.norm(wanted), 1e-30))

    return error
