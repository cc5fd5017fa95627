"""The fast engine plays what the naive one plays, whatever the slots, the devices and the order of arrival."""

import jax
import numpy as np
import pytest

from rlrag.trajectory import SAMPLED, Example
from tests.rollout.rehearsal import Naive, fingerprint, parameters, print_fingerprint, roll_out


@pytest.fixture(scope="module")
def reference() -> list:
    naive = Naive(parameters())
    return [[naive.episode(Example(f"q{i}", "", ("",)), sample) for sample in range(2)] for i in range(6)]


@pytest.mark.parametrize(
    "changes",
    [
        {"most_s": 0.01},
        {"num_slots": 3, "burst": 1, "most_s": 0.01},
        {"num_slots": 16, "burst": 9, "prefill_rows": 2, "prefill_chunk": 17},
        {"num_slots": 4, "num_pages": 60, "most_s": 0.01},  # pages are taken from waiting streams
        {"page_size": 192, "num_pages": 24},  # contiguous: one page a stream
    ],
    ids=["late", "few_slots", "long_burst", "few_pages", "contiguous"],
)
def test_equals_naive_engine(reference, changes):
    groups = roll_out(6, 2, **changes)
    for group, expected in zip(groups, reference, strict=True):
        for trajectory, naive in zip(group.trajectories, expected, strict=True):
            assert len(trajectory.streams) == len(naive.streams) == 2
            for stream in naive.streams:
                mine = next(s for s in trajectory.streams if s.name == stream.name)
                np.testing.assert_array_equal(mine.tokens, stream.tokens)
                np.testing.assert_array_equal(mine.act, stream.act)
            assert trajectory.outcome.answer == naive.outcome.answer
    sampled = sum(t.num_sampled for group in groups for t in group.trajectories)
    assert sampled > 200


def test_equal_on_eight_devices(run_on_devices):
    printed = run_on_devices(print_fingerprint, 8)
    assert printed.split()[-1] == fingerprint(roll_out(6, 2))


def test_groups_share_the_prompt():
    """Samples of one question cache their common prompt once."""
    from rlrag.agents.workflow import Generate, Role
    from rlrag.mesh import make_mesh
    from rlrag.model.transformer import pack
    from rlrag.rollout.decoder import Decoder
    from rlrag.rollout.engine import Engine, Play
    from rlrag.trajectory import Outcome
    from tests.rollout.rehearsal import ARCHITECTURE, END, SPEC, VOCABULARY, decode

    def workflow(example, mode):
        yield Generate("s", "r", list(range(1, 23)), (), 3)
        return Outcome(None)

    decoder = Decoder(ARCHITECTURE, SPEC, VOCABULARY, END, make_mesh())
    engine = Engine({"m": decoder}, decode, max_episodes=8)
    weights = pack(parameters(), ARCHITECTURE)
    examples = [Example("a", "", ("",))]
    list(engine.run({"m": weights}, examples, Play(workflow, {"r": Role("m")}, group_size=8), jax.random.key(0)))
    # 22 prompt tokens: the newest is decoded, five pages of four are shared, one token is each sample's own.
    assert decoder.usage.shared_tokens == 7 * 20
    assert decoder.usage.prefill_tokens == 21 + 7


def test_every_sampled_token_has_its_numbers():
    for group in roll_out(3, 2):
        for trajectory in group.trajectories:
            for span in (span for stream in trajectory.streams for span in stream.spans if span.act == SAMPLED):
                n = len(span.tokens)
                assert span.logp.shape == span.entropy.shape == span.certainty.shape == span.margin.shape == (n,)
                assert (span.logp <= 1e-6).all() and (span.entropy >= -1e-6).all() and (span.certainty >= -1e-5).all()
                if span.kept is not None:
                    assert (span.kept == span.tokens[:, None]).any(-1).all(), "a token outside the set it came from"
