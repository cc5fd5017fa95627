"""Streams, calls and counts of a rollout."""

import numpy as np
import pytest

from rlrag.agents.workflow import Sampling
from rlrag.rollout.streams import CachedStream, Call, Usage


def test_a_stream_never_exceeds_its_capacity():
    stream = CachedStream(uid=1, shard=0, capacity=4, tokens=np.zeros(4, np.int32))
    stream.append([5, 6, 7])
    assert stream.length == 3
    with pytest.raises(ValueError, match=r"would hold 5 tokens, rollout.max_tokens is 4"):
        stream.append([8, 9])
    np.testing.assert_array_equal(stream.tokens, [5, 6, 7, 0])


def test_a_call_joins_what_its_bursts_emitted():
    call = Call("ticket", 9, 0, Sampling(), None, False)
    for tokens in ([1, 2], [3]):
        numbers = [np.array(tokens, np.float32)] * 4
        call.parts.append((np.array(tokens, np.int32), *numbers, np.zeros((len(tokens), 2), np.int32)))
    tokens, logp, *_, kept = call.emitted()
    np.testing.assert_array_equal(tokens, [1, 2, 3])
    np.testing.assert_array_equal(logp, [1, 2, 3])
    assert kept.shape == (3, 2)


def test_usage_of_a_rollout_is_a_difference():
    before, after = Usage(rounds=2, device_s=0.5), Usage(rounds=5, device_s=2.0, evictions=1)
    assert after - before == Usage(rounds=3, device_s=1.5, evictions=1)
