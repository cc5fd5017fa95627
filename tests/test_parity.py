"""Sampler and learner say the same of every sampled token: the gap that exact ratios rest on.

Each is measured in a process of its own, whose programs are compiled as for users.
"""

from dataclasses import replace

import jax
import numpy as np

from rlrag.agents.workflow import Role
from rlrag.model.architecture import Adapters
from rlrag.model.parameters import initialize
from rlrag.objectives.scoring import score
from rlrag.packing import Shape, pack
from rlrag.rewards.paid import Paid
from tests.rollout.rehearsal import ARCHITECTURE, roll_out

ROLES = {"talker": 0, "chooser": 1}


def sharpened():
    """A sharpened head gives preferences (entropy 2.6 of 4.2 nats). A sharpened trunk would make single positions
    ill-conditioned: there both sides are up to 2e-5 from float64."""
    fresh = initialize(ARCHITECTURE, jax.random.key(0))
    return fresh.replace(head=fresh.head * 2)


def played(params):
    """Episodes of several turns with documents between them, sampled with temperatures, top-k, top-p, both, greedily,
    within allowed ids and within a shrinking set of them (tests.rollout.rehearsal.talk)."""
    groups = roll_out(60, 8, params=params, max_episodes=96, num_slots=64, num_pages=4096, prefill_rows=64)
    paid = [[Paid({}) for _ in group.trajectories] for group in groups]
    return pack(
        groups, paid, ROLES, (), Shape(rows=64, tokens=192, max_segments=16, max_micro=8, num_kept=8, num_rewards=0)
    )


def ten_thousand_tokens() -> None:
    params = sharpened()
    packed = played(params)
    one = jax.jit(lambda batch: score(params, ARCHITECTURE, batch))
    micros = [jax.tree.map(lambda leaf: leaf[i], packed.batch) for i in range(packed.num_micro)]  # noqa: B023
    scores = jax.tree.map(lambda *leaves: np.stack(leaves), *[one(micro) for micro in micros])
    batch = jax.tree.map(lambda leaf: leaf[: packed.num_micro], packed.batch)
    sampled = batch.act == 1
    filtered = (batch.kept >= 0).any(-1)
    chooser = batch.role == 1
    count = int(sampled.sum())
    gaps = {name: np.abs(getattr(scores, name) - getattr(batch, name)) for name in ("logp", "entropy", "certainty")}
    print(f"\nsampler and learner, float32, {count} tokens of {packed.num_episodes} episodes, fill {packed.fill:.2f}")
    kinds = {
        "all": sampled,
        "whole vocabulary, temperature 1": sampled & ~filtered & (batch.temperature == 1),
        "whole vocabulary, temperature 1.7": sampled & ~filtered & (batch.temperature == np.float32(1.7)),
        "top-k (temperature 0.8)": sampled & filtered & (batch.temperature == np.float32(0.8)),
        "top-p (temperature 1.3)": sampled & filtered & (batch.temperature == np.float32(1.3)),
        "top-k and top-p (temperature 0.9)": sampled & filtered & (batch.temperature == np.float32(0.9)),
        "allowed ids": sampled & filtered & (batch.temperature == 1) & ~chooser,
        "allowed ids, each once": sampled & filtered & chooser,
    }
    for kind, where in kinds.items():
        largest = {name: float(gap[where].max()) for name, gap in gaps.items()}
        shown = "  ".join(f"{name} {value:.1e}" for name, value in largest.items())
        mean = gaps["logp"][where].mean()
        print(f"  {kind:36s} {int(where.sum()):6d} tokens  largest gap: {shown}  mean logp {mean:.1e}")
        assert where.sum() > 300, f"{kind}: too few tokens to say anything"
    assert count >= 10_000
    assert gaps["logp"][sampled].max() <= 1e-5
    assert gaps["entropy"][sampled].max() <= 3e-5
    assert gaps["certainty"][sampled].max() <= 3e-5
    assert (batch.logp[sampled] < -1e-3).mean() > 0.5, "log-probs that are all 0 would agree as well"
    observed_between = (batch.act == 0) & (batch.turn > 0) & (batch.segment > 0)
    assert observed_between.sum() > 1000, "documents"


def test_sampler_and_learner_agree_on_ten_thousand_tokens(run_on_devices):
    print(run_on_devices(ten_thousand_tokens, 1, optimised=True))


def adapters_of_their_own() -> None:
    a = replace(ARCHITECTURE, base="int8", adapters=Adapters(rank=2, alpha=4.0, names="one,two"))
    fresh = initialize(a, jax.random.key(0))
    loud = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(1), leaf.shape), fresh.adapters)
    params = fresh.replace(head=fresh.head * 2, adapters=loud)
    roles = {"talker": Role("m", adapter="one"), "chooser": Role("m", adapter="two")}
    groups = roll_out(8, 4, params=params, a=a, roles=roles)
    paid = [[Paid({}) for _ in group.trajectories] for group in groups]
    shape = Shape(rows=64, tokens=192, max_segments=16, max_micro=1, num_kept=8, num_rewards=0, num_adapters=2)
    batch = jax.tree.map(lambda leaf: leaf[0], pack(groups, paid, ROLES, (), shape, {"talker": 0, "chooser": 1}).batch)
    sampled = batch.act == 1
    assert ((batch.role == 1) & sampled).sum() > 50

    def gaps(given):
        return np.abs(jax.jit(lambda b: score(params, a, b))(given).logp - batch.logp)[sampled]

    # Loud adapters make single tokens ill-conditioned: all of 707 but one are within 7e-6. Of that one, computed in
    # float64, sampler and learner are 1.2e-5 away, one on either side.
    assert np.sort(gaps(batch))[-2] <= 1e-5 and gaps(batch).max() <= 1e-4
    turned = batch.segments.replace(adapters=batch.segments.adapters[..., ::-1])
    assert gaps(batch.replace(segments=turned)).max() > 0.1, "it matters which of them speaks"


def test_they_agree_where_roles_speak_with_adapters_of_their_own(run_on_devices):
    """Both roles begin with the same tokens, whose pages one adapter must not read of the other's."""
    run_on_devices(adapters_of_their_own, 1, optimised=True)
