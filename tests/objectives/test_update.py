"""The update: what must change nothing changes nothing, and one step is the step of the textbook."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlrag import hlo, packing
from rlrag.model.transformer import trunk
from rlrag.objectives import scoring
from rlrag.objectives.credit import group_relative, ones
from rlrag.objectives.losses import nll, surrogate
from rlrag.objectives.optimizer import build_optimizer, build_schedule
from rlrag.objectives.update import Update, build_prepare
from rlrag.rewards.paid import Paid
from rlrag.trajectory import Group
from tests.episodes import make_groups, pack_groups, pay
from tests.objectives.learner import (
    ARCHITECTURE,
    build_update,
    difference,
    differentiate,
    one_device,
    parameters,
    prepare,
)

OBJECTIVE = surrogate(kl="k3")
ON_POLICY = surrogate(recompute_old=True)
GROUPS = make_groups(21, 3, 4)
PAID = pay(GROUPS, 5)


@pytest.fixture(scope="module")
def whole():
    """Everything in one micro-batch."""
    return differentiate(OBJECTIVE, pack_groups(GROUPS, PAID, rows=16, max_micro=1))


def same(one, other) -> None:
    assert abs(one.loss - other.loss) <= 1e-6
    assert difference(one.gradient, other.gradient) <= 1e-6
    for name, value in one.metrics.items():
        assert other.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_the_gradient_is_worth_comparing(whole):
    assert whole.loss != 0
    assert difference(whole.gradient, jax.tree.map(jnp.zeros_like, whole.gradient)) > 0.05


@pytest.mark.parametrize(
    "shape",
    [
        {"rows": 1, "max_micro": 24, "tokens": 200},  # micro-batches of one row
        {"rows": 2, "max_micro": 24, "tokens": 80, "max_segments": 3},
    ],
    ids=["single_long_rows", "short_rows"],
)
def test_rows_and_micro_batches_change_nothing(whole, shape):
    packed = pack_groups(GROUPS, PAID, **shape)
    assert packed.num_micro > 1
    same(whole, differentiate(OBJECTIVE, packed))


def test_sharing_prefixes_changes_nothing(whole, monkeypatch):
    assert any(place.start for place in pack_groups(GROUPS, PAID).places)
    monkeypatch.setattr(packing, "NEGLIGIBLE", 10**9)
    packed = pack_groups(GROUPS, PAID, rows=16, max_micro=1)
    assert not any(place.start for place in packed.places)
    same(whole, differentiate(OBJECTIVE, packed))


def test_order_changes_nothing(whole):
    dice = np.random.default_rng(0)
    groups, paid = [], []
    for g in dice.permutation(len(GROUPS)):
        order = dice.permutation(len(PAID[g]))
        groups.append(Group(GROUPS[g].example, [GROUPS[g].trajectories[i] for i in order]))
        paid.append([PAID[g][i] for i in order])
    same(whole, differentiate(OBJECTIVE, pack_groups(groups, paid, rows=16, max_micro=1)))


def test_observed_tokens_as_targets_change_no_bit(monkeypatch):
    """Other ids as targets wherever a token is observed, the same ids as inputs: loss and gradient are bit-equal."""
    packed = pack_groups(GROUPS, PAID, rows=16, max_micro=1)
    inputs = jnp.array(packed.batch.tokens[0])
    monkeypatch.setattr(scoring, "trunk", lambda params, a, _, *rest: trunk(params, a, inputs, *rest))
    objective = surrogate(recompute_old=True)  # traced with that

    def learn(where: np.ndarray):
        tokens = np.where(where, (packed.batch.tokens + 7) % 64, packed.batch.tokens).astype(np.int32)
        batch = packed.batch.replace(tokens=tokens)
        return differentiate(objective, packing.Packed(**{**vars(packed), "batch": batch}))

    before = learn(np.zeros_like(packed.batch.act, bool))
    after = learn(packed.batch.act == 0)
    assert after.metrics == before.metrics
    jax.tree.map(np.testing.assert_array_equal, after.gradient, before.gradient)
    assert difference(learn(packed.batch.act == 1).gradient, before.gradient) > 1e-3, "trained targets do count"


def test_groups_of_equal_rewards_have_gradient_exactly_zero():
    paid = [[Paid({"answer": [1.0] * len(t.streams)}) for t in group.trajectories] for group in GROUPS]
    result = differentiate(ON_POLICY, pack_groups(GROUPS, paid, rows=16, max_micro=1))
    assert result.loss == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(result.gradient))
    assert float(result.prepared.metrics["zero_variance_groups"].value()) == 1.0


def test_prepare_writes_what_the_objective_reads():
    packed = pack_groups(GROUPS, PAID, rows=16, max_micro=1)
    act = packed.batch.act
    assert (act == 2).any()
    params, reference = parameters(), parameters(1)
    score = jax.jit(
        lambda p: scoring.score(p, build_update(nll()).architecture, jax.tree.map(lambda x: x[0], packed.batch)).logp
    )
    own, theirs = (np.asarray(score(p))[None] for p in (params, reference))
    for recompute in (False, True):
        update = build_update(surrogate(kl="k3", recompute_old=recompute))
        batch = prepare(update, packed, params, reference, group_relative()).batches["m"]
        np.testing.assert_array_equal(batch.logp, packed.batch.logp)
        np.testing.assert_allclose(np.asarray(batch.ref_logp)[act > 0], theirs[act > 0], atol=1e-6)
        sampled = own if recompute else packed.batch.logp
        np.testing.assert_allclose(np.asarray(batch.old_logp)[act == 1], sampled[act == 1], atol=1e-6)
        # The sampler knows nothing of forced tokens: they are scored in either case.
        np.testing.assert_allclose(np.asarray(batch.old_logp)[act == 2], own[act == 2], atol=1e-6)


def test_on_policy_nothing_is_clipped():
    result = differentiate(ON_POLICY, pack_groups(GROUPS, PAID, rows=16, max_micro=1))
    assert result.metrics["clip_fraction"] == 0.0
    assert result.metrics["ratio"] == pytest.approx(1, abs=1e-6)


def test_step_is_clipped_adamw():
    """Three steps against NumPy: global-norm clip, Adam with bias correction, decoupled decay."""
    rate, b1, b2, decay, clip = 0.01, 0.8, 0.95, 0.1, 0.5
    update = build_update(nll(), rate=rate, b1=b1, b2=b2, weight_decay=decay, clip_norm=clip)
    state = update.initialize(parameters())
    expected = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(parameters())]
    m, v = [0.0 * leaf for leaf in expected], [0.0 * leaf for leaf in expected]
    dice = np.random.default_rng(0)
    for step, scale in enumerate((1e-3, 1.0, 30.0), start=1):
        gradient = [scale * dice.normal(size=leaf.shape) for leaf in expected]
        norm = np.sqrt(sum((g**2).sum() for g in gradient))
        tree = jax.tree.unflatten(jax.tree.structure(state.params), [jnp.float32(g) for g in gradient])
        state, applied = update.apply(state, tree)
        assert float(applied.grad_norm) == pytest.approx(norm, rel=1e-5)
        for i, g in enumerate(gradient):
            g = g * min(1, clip / norm)
            m[i], v[i] = b1 * m[i] + (1 - b1) * g, b2 * v[i] + (1 - b2) * g * g
            moved = (m[i] / (1 - b1**step)) / (np.sqrt(v[i] / (1 - b2**step)) + 1e-8)
            expected[i] = expected[i] - rate * (moved + decay * expected[i])
    for mine, wanted in zip(jax.tree.leaves(state.params), expected):
        np.testing.assert_allclose(mine, wanted, atol=2e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_gradient_that_is_not_finite_is_skipped_and_reported(value):
    """1e30: every number is finite, their norm is not."""
    schedule = build_schedule("linear", 1e-2, 0, 10, 0.0)
    optimizer = build_optimizer(schedule, b1=0.9, b2=0.99, weight_decay=0.1, clip_norm=1.0)
    update = Update(ARCHITECTURE, nll(), optimizer, schedule, one_device())
    state = update.initialize(parameters())
    good = jax.tree.map(jnp.ones_like, state.params)
    state, first = update.apply(state, good)
    kept = jax.device_get((state.params, state.opt_state.inner_state))
    bad = good.replace(final_norm=good.final_norm.at[3].set(value))
    state, second = update.apply(state, bad)
    assert (float(first.skipped), float(second.skipped)) == (0.0, 1.0)
    assert not np.isfinite(float(second.grad_norm))
    jax.tree.map(np.testing.assert_array_equal, kept, jax.device_get((state.params, state.opt_state.inner_state)))
    state, third = update.apply(state, good)
    assert float(third.skipped) == 0.0
    assert difference(kept[0], state.params) > 1e-4
    # The schedule stands still in a skipped step: what is reported is what was used.
    assert [float(a.learning_rate) for a in (first, second, third)] == pytest.approx([0.01, 0.009, 0.009])
    assert int(state.step) == 3


@pytest.mark.parametrize(
    ("kind", "warm_up", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("constant", 4, [0.25, 0.5, 0.75, 1, 1, 1]),
        ("constant", 1, [1, 1, 1]),
        ("linear", 2, [0.5, 1, 1, 1 - 0.9 / 8, 1 - 1.8 / 8]),
        ("cosine", 0, [1 - 0.45 * (1 - np.cos(np.pi * t / 10)) for t in range(11)]),
    ],
)
def test_schedules(kind, warm_up, expected):
    schedule = build_schedule(kind, 2.0, warm_up, 10, 0.1)
    assert [float(schedule(step)) / 2 for step in range(len(expected))] == pytest.approx(expected)
    if kind != "constant":
        assert float(schedule(10)) == pytest.approx(0.2)
        assert float(schedule(99)) == pytest.approx(0.2)


def test_a_schedule_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"update\.schedule is 'cosin': choose constant, cosine or linear"):
        build_schedule("cosin", 1.0, 0, 10, 0.0)


def test_minibatches_are_normalised_by_their_own_tokens():
    """A step on some micro-batches is the step of a batch that holds nothing else."""
    packed = pack_groups(GROUPS, PAID, rows=2, max_micro=4)
    assert packed.num_micro >= 3
    update = build_update(nll())
    moved = []
    for keep, micros in (([0, 1, 2, 3], [2, 0]), ([2, 0, 2, 0], [0, 1])):
        batch = jax.tree.map(lambda leaf: leaf[keep], packed.batch)  # noqa: B023
        part = packing.Packed(**{**vars(packed), "batch": batch, "num_micro": 4})
        prepared = prepare(update, part, parameters(), None, ones())
        state, sums, _ = update.step(
            update.initialize(parameters()), prepared.batches["m"], prepared.counts["m"], {}, micros
        )
        moved.append((state.params, float(sums["loss/nll"].value())))
    assert moved[0][1] == pytest.approx(moved[1][1], rel=1e-6)
    assert difference(moved[0][0], moved[1][0]) <= 1e-6


def test_metrics_of_a_step_are_its_own():
    """Nothing is left over from the step before, whose sums were donated."""
    packed = pack_groups(GROUPS, PAID, rows=2, max_micro=4)
    update = build_update(nll())
    state = update.initialize(parameters())
    counts = []
    for micros in ([0, 1], [0, 1], [0]):
        prepared = prepare(update, packed, state.params, None, ones())
        state, sums, _ = update.step(state, prepared.batches["m"], prepared.counts["m"], {}, micros)
        counts.append(float(sums["loss/nll"].count))
    trained = (packed.batch.act > 0).sum((1, 2))
    assert counts == [trained[0] + trained[1], trained[0] + trained[1], trained[0]]


def test_rows_that_the_devices_cannot_share_are_named():
    class TwoShards:
        shape, size = {"data": 2, "model": 1}, 2

    update = build_update(nll())
    update.mesh = TwoShards()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"update\.micro_rows is 3: make it a multiple of the 2 data shard"):
        update.put(pack_groups(GROUPS, PAID, rows=3).batch)


@pytest.mark.parametrize("max_micro", [1, 2])
def test_what_no_objective_needs_is_not_scored(max_micro):
    """All products of prepare stand in its loop over micro-batches, which then has no turn; in one micro-batch too, of
    which the loop's index chooses nothing, so that the compiler could move them in front of it."""
    update, packed = build_update(surrogate()), pack_groups(GROUPS, PAID, rows=16, max_micro=max_micro)
    program = build_prepare(
        {"m": update.architecture}, {"m": update.objective}, {"m": "m"}, group_relative(), packed.num_groups,
        packed.num_episodes, update.mesh,
    )  # fmt: skip
    batch, number = {"m": update.put(packed.batch)}, {"m": np.int32(packed.num_micro)}
    compiled = program.lower({"m": parameters()}, {"m": None}, batch, number, {}).compile()
    counted = hlo.read(compiled.as_text(), dict(update.mesh.shape))
    assert counted.once.flops == 0 < sum(each.flops for each in counted.loops)


def test_gradients_are_added_in_place():
    """No second copy of what is added to, nor of the parameters: the gradients that go in come out."""
    update = build_update(surrogate())
    packed = pack_groups(make_groups(1))
    state = update.initialize(parameters())
    prepared = prepare(update, packed, state.params, None, group_relative())
    batch, counts = prepared.batches["m"], prepared.counts["m"]
    chosen = np.ones(batch.tokens.shape[0], np.float32)
    compiled = update.accumulate.lower(
        state.params, update._zeros(), update.no_metrics(batch), batch, counts, {}, chosen, np.int32(0), state.step
    ).compile()
    gradient_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(update._zeros()))
    assert compiled.memory_analysis().alias_size_in_bytes >= gradient_bytes
    computations, entry = hlo.parse(compiled.as_text())
    sizes = {tuple(leaf.shape) for leaf in jax.tree.leaves(state.params)}
    copied = [
        each.operands[0] for each in computations[entry]
        if each.operation == "copy" and any(shape in sizes and len(shape) > 1 for _, shape in hlo.shapes(each.type))
    ]  # fmt: skip
    # Zeros, which the scan over layers fills with the micro-batch's own gradient, are all that may be copied.
    assert all("broadcast" in name for name in copied), copied
