"""The plain sampler is right: what it reports of its tokens is what the learner says of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlrag.model.transformer import trunk
from rlrag.speed import fixed_batch, rollout
from rlrag.speed.workload import Workload
from tests.speed.tiny import ARCHITECTURE

UNEVEN = Workload(ARCHITECTURE.vocab_size, prompt_tokens=5, turns=(1, 2), turn_tokens=(20, 45), document_tokens=(1, 4))


def test_log_probs_are_those_of_the_trunk(monkeypatch):
    params = rollout.start(ARCHITECTURE)
    weights = rollout.packed(ARCHITECTURE, params)
    monkeypatch.setattr(fixed_batch, "BUCKET", 64)  # so that the cache grows
    monkeypatch.setattr(fixed_batch, "CHUNK", 16)
    turns_out = []
    write = fixed_batch.write

    def kept(*arguments):
        cache, out = write(*arguments)
        turns_out.append(jax.device_get(out))
        return cache, out

    monkeypatch.setattr(fixed_batch, "write", kept)
    episodes = [UNEVEN.episode(str(n)) for n in range(3)]
    tokens, steps = fixed_batch.play_batch(ARCHITECTURE, weights, episodes, 4, jax.random.key(0))
    assert tokens == sum(turn.length for turns in episodes for turn in turns)
    longest = [max(turns[n].length for turns in episodes if n < len(turns)) for n in range(max(map(len, episodes)))]
    assert steps == sum(longest)
    for row, turns in enumerate(episodes):
        ids, said, where = [], [], []
        for turn, out in zip(turns, turns_out):
            ids += list(turn.append)
            where += range(len(ids), len(ids) + turn.length)
            ids += out.tokens[row, : turn.length].tolist()
            said += out.logp[row, : turn.length].tolist()
        line = jnp.array([ids])
        hidden = trunk(
            params, ARCHITECTURE, line, jnp.arange(len(ids))[None], jnp.ones_like(line), jnp.zeros((1, 2), int)
        )
        logp = jax.nn.log_softmax(hidden[0] @ params.output_head.T)
        right = [float(logp[at - 1, ids[at]]) for at in where]
        np.testing.assert_allclose(said, right, atol=1e-5)


def test_batches_are_played_one_after_another(monkeypatch):
    played = []
    monkeypatch.setattr(
        fixed_batch, "play_batch", lambda a, w, episodes, batch, root: played.append(episodes) or (5, 3)
    )
    seconds, tokens, lane_steps = fixed_batch.play(ARCHITECTURE, None, list("abcde"), 2, None)  # type: ignore[arg-type]
    assert played == [["a", "b"], ["c", "d"], ["e"]]
    assert (tokens, lane_steps) == (15, 18)
    assert seconds >= 0


@pytest.mark.parametrize(("number", "unit", "expected"), [(1, 4, 4), (4, 4, 4), (5, 4, 8), (0, 4, 0)])
def test_rounding_up(number, unit, expected):
    assert fixed_batch.up(number, unit) == expected
