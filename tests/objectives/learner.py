"""A small model learning from random episodes: what the tests of objectives share."""

from functools import cache
from typing import NamedTuple

import jax
import numpy as np

from rlrag.mesh import make_mesh
from rlrag.metrics import numbers
from rlrag.model.architecture import Architecture
from rlrag.model.parameters import Transformer, initialize
from rlrag.objectives.credit import Credit, group_relative
from rlrag.objectives.losses import MAX_TURNS, Objective
from rlrag.objectives.optimizer import build_optimizer, build_schedule
from rlrag.objectives.update import Prepared, Update, build_prepare
from rlrag.packing import Packed
from tests.episodes import VOCAB_SIZE

ARCHITECTURE = Architecture(
    vocab_size=VOCAB_SIZE, num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=24, qk_norm=True
)
COEFFICIENTS = {"kl": np.float32(0.2), "kl_reward": np.float32(0.1)}


@cache
def one_device() -> jax.sharding.Mesh:
    return make_mesh(devices=jax.devices()[:1])


def parameters(key: int = 0) -> Transformer:
    """Sharpened, so that distributions have preferences."""
    return jax.tree.map(lambda leaf: leaf * 1.5, initialize(ARCHITECTURE, jax.random.key(key)))


def build_update(
    objective: Objective, mesh: jax.sharding.Mesh | None = None, rate: float = 1e-2, **optimizer
) -> Update:
    schedule = build_schedule("constant", rate, 0, 100, 0.0)
    options = {"b1": 0.9, "b2": 0.99, "weight_decay": 0.0, "clip_norm": 1.0} | optimizer
    return Update(ARCHITECTURE, objective, build_optimizer(schedule, **options), schedule, mesh or one_device())


# The programs are pure: tests of one objective share what it compiles to. One that patches what is traced makes an
# objective of its own.
shared_update = cache(build_update)
CREDIT = group_relative()


@cache
def shared_prepare(objective: Objective, credit: Credit, num_groups: int, num_episodes: int, mesh: jax.sharding.Mesh):
    return build_prepare({"m": ARCHITECTURE}, {"m": objective}, {"m": "m"}, credit, num_groups, num_episodes, mesh)


class Gradient(NamedTuple):
    loss: float
    gradient: Transformer
    metrics: dict[str, float]
    prepared: Prepared


def prepare(
    update: Update, packed: Packed, params: Transformer, reference: Transformer | None, credit: Credit
) -> Prepared:
    program = shared_prepare(update.objective, credit, packed.num_groups, packed.num_episodes, update.mesh)
    num_micro = {"m": np.int32(packed.num_micro)}
    return program({"m": params}, {"m": reference}, {"m": update.put(packed.batch)}, num_micro, COEFFICIENTS)


def differentiate(
    objective: Objective, packed: Packed, *, params: Transformer | None = None, credit: Credit | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Gradient:  # fmt: skip
    """Loss, gradient and metrics of a whole packed batch, through the programs of the update."""
    update = shared_update(objective, mesh)
    state = update.initialize(parameters() if params is None else params)
    reference = parameters(1) if "ref_logp" in objective.needs else None
    prepared = prepare(update, packed, state.params, reference, credit or CREDIT)
    batch, counts = prepared.batches["m"], prepared.counts["m"]
    chosen = np.zeros(batch.tokens.shape[0], np.float32)
    chosen[: packed.num_micro] = 1
    gradient, sums = update._zeros(), update.no_metrics(batch)
    for index in range(packed.num_micro):
        gradient, sums = update.accumulate(
            state.params, gradient, sums, batch, counts, COEFFICIENTS, chosen, np.int32(index), state.step
        )
    metrics = numbers(jax.device_get(sums), {"role": ["agent"], "turn": list(map(str, range(MAX_TURNS)))})
    loss = sum(metrics[f"loss/{name}"] * COEFFICIENTS.get(name, 1.0) for name in counts)
    return Gradient(loss, jax.device_get(gradient), metrics, prepared)


def difference(first: Transformer, second: Transformer) -> float:
    """The largest absolute difference of any number in two trees."""
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)
