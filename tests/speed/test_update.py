"""Updates of groups that nobody played: packed whole, by three programs, whatever learns."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from rlrag.speed import rollout, update
from rlrag.speed.floor import state_bytes
from rlrag.speed.update import ADAPTERS, ALL, GRADIENTS, Pupil, RowSizes, rows_of
from rlrag.speed.workload import Workload
from tests.speed.tiny import ARCHITECTURE, Rates

LEARN = Workload(ARCHITECTURE.vocab_size, prompt_tokens=20, turns=(2, 2), turn_tokens=(3, 3), document_tokens=(4, 4))
GROUPS = LEARN.groups(3, 4)
SIZES = RowSizes(rows=1, tokens=64)


def test_micro_batches_are_as_many_as_needed_and_every_token_is_counted():
    made = update.packed(GROUPS, SIZES, ALL)
    rows = rows_of(made)
    # A prompt of 19 shared tokens once a group, then its last token, two turns and a document a sample.
    assert rows == (3 * (19 + 4 * 11), 3 * (19 * 20 // 2 + 4 * sum(range(20, 31))), 3)
    assert made.fill == pytest.approx(63 / 64)
    assert int((np.asarray(made.batch.act) > 0).sum()) == 3 * 4 * 6


def test_rewards_differ_within_a_group():
    assert len({update.reward(GROUPS[0], sample).per_call["score"][0] for sample in range(4)}) > 1


@pytest.mark.parametrize("learns", [ALL, GRADIENTS, ADAPTERS])
def test_what_learns_changes_and_nothing_else(learns):
    params = rollout.start(ARCHITECTURE)
    before = jax.tree.map(np.asarray, params.layers)
    pupil = Pupil(ARCHITECTURE, params, learns, 12, 3)
    made = update.packed(GROUPS, SIZES, learns)
    learned = [pupil.learn(made) for _ in range(2)]
    same = jax.tree.map(lambda x, y: bool((x == np.asarray(y)).all()), before, pupil.parameters.layers)
    assert all(jax.tree.leaves(same)) == (learns != ALL)
    assert pupil.programs == {"prepare": 1, "accumulate": 1, "apply": int(learns != GRADIENTS)}
    assert learned[0].seconds > 0
    report = pupil.report(made, learned[1], Rates)
    assert report["learns"] == learns
    assert report["micro_batches"] == 3
    assert report["share_of_matrix"] == pytest.approx(report["update_flops"] / 1e9 / report["accumulate_s"])


def test_what_fits_is_chosen():
    a = replace(ARCHITECTURE, param_dtype="bfloat16")
    whole, gradients = (state_bytes(a, optimizer) / update.SPARE for optimizer in (True, False))
    chosen = [update.choose(a, int(room)) for room in (1.01 * whole, 0.99 * whole, 1.01 * gradients, 0.99 * gradients)]
    assert chosen == [ALL, GRADIENTS, GRADIENTS, ADAPTERS]
