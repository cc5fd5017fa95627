import jax.numpy as jnp
import numpy as np

from rlrag.trajectory import FORCED, OBSERVED, SAMPLED
from tests.episodes import make_groups, pack_groups


def test_what_is_trained_and_what_was_sampled_follow_from_act():
    batch = pack_groups(make_groups(0)).batch
    batch = batch.replace(act=jnp.array([[OBSERVED, SAMPLED, FORCED]]))
    np.testing.assert_array_equal(batch.trained, [[0, 1, 1]])
    np.testing.assert_array_equal(batch.sampled, [[0, 1, 0]])
    assert batch.trained.dtype == batch.sampled.dtype == jnp.float32


def test_padding_is_segment_zero_and_says_nothing():
    batch = pack_groups(make_groups(0)).batch
    padding = batch.segment == 0
    assert padding.any()
    for name in ("tokens", "positions", "act", "logp", "weight"):
        assert (getattr(batch, name)[padding] == 0).all(), name
    assert (batch.kept[padding] == -1).all()
    assert (batch.segments.episode[..., 0] == -1).all()
    assert not batch.segments.valid[..., 0, :].any()
