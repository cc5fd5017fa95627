"""One stage's learning: collected episodes in, an update out: pack, prepare, accumulate, apply, for every model."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from rlrag import config, processes
from rlrag.collection import Collected
from rlrag.console import say
from rlrag.evaluate import total_reward
from rlrag.mesh import own_rows
from rlrag.metrics import Metrics, merge, numbers
from rlrag.model.adapters import silent
from rlrag.model.architecture import Architecture
from rlrag.model.parameters import Transformer, reshaped, shardings
from rlrag.objectives.losses import MAX_TURNS
from rlrag.objectives.optimizer import build_optimizer, build_schedule
from rlrag.objectives.update import TrainState, Update, build_prepare
from rlrag.packing import Packed, RowsExhausted, Shape, unpack
from rlrag.packing import pack as pack_rows
from rlrag.recipes.recipe import POLICY, Learn, Stage
from rlrag.rewards.paid import Paid
from rlrag.trajectory import TRUNCATED, Group

Call = tuple[int, int]  # number of the trajectory in the batch, number of the stream in it


class Learned(NamedTuple):
    """What a step was like and did, by name; and the weight of every token of each stream, less what it shares."""

    values: dict[str, float]
    advantages: dict[Call, np.ndarray]


class Programs:
    """What one stage compiles: prepare over all its models, accumulate and apply of each that learns."""

    def __init__(self, stage: Stage, a: Architecture, mesh: jax.sharding.Mesh, num_kept: int, seed: int = 0):
        self.stage, self.num_kept, self.num_adapters = stage, num_kept, len(a.adapters.listed)
        recipe = stage.recipe
        self.architectures = {name: architecture_of(a, recipe.learn.get(name)) for name in recipe.models}
        self.reads = {name: learn.reads or name for name, learn in recipe.learn.items()}
        self.refers = [name for name, learn in recipe.learn.items() if "ref_logp" in learn.objective.needs]
        self.updates = {
            name: build_update(stage, self.architectures[name], learn, mesh, seed)
            for name, learn in recipe.learn.items()
        }
        questions, episodes = stage.settings.questions, stage.settings.questions * stage.settings.group_size
        objectives = {name: learn.objective for name, learn in recipe.learn.items()}
        self.prepare = build_prepare(
            self.architectures, objectives, self.reads, recipe.credit, questions, episodes, mesh
        )

    def shape(self, max_micro: int) -> Shape:
        """Of a packed batch."""
        update = self.stage.settings.update
        return Shape(
            update.micro_rows, update.row_tokens, update.max_segments, max_micro, self.num_kept,
            len(self.stage.recipe.rewards), self.num_adapters,
        )  # fmt: skip

    def own_shape(self, max_micro: int) -> Shape:
        """Of the rows of this process."""
        whole = self.shape(max_micro)
        return replace(whole, rows=whole.rows // processes.count())


class Learner:
    """The models of one stage, the train states of those that learn, and what changes them."""

    def __init__(
        self,
        stage: Stage,
        a: Architecture,
        mesh: jax.sharding.Mesh,
        num_kept: int,
        models: Mapping[str, Transformer],
        seed: int = 0,
        programs: Programs | None = None,
    ):
        """models are taken over: what begins the stage, by name, and the reference where an objective wants one. A
        model that is not among them begins as a copy of `policy`. seed: of dropout; programs: those of all the others,
        where they are compiled already."""
        self.stage, self.max_micro = stage, stage.settings.update.max_micro
        self.programs = programs = programs or Programs(stage, a, mesh, num_kept, seed)
        begun = {name: begin(models, name, own, mesh) for name, own in programs.architectures.items()}
        self.frozen = {name: params for name, params in begun.items() if name not in programs.updates}
        self.references: dict[str, Any] = {
            name: reference(begun[name], update, stage.recipe.learn[name]) if name in programs.refers else None
            for name, update in programs.updates.items()
        }
        self.states: dict[str, TrainState] = {
            name: update.initialize(begun[name]) for name, update in programs.updates.items()
        }
        self.roles = {name: index for index, name in enumerate(stage.recipe.roles)}
        self.coefficients = {name: coefficient.value for name, coefficient in stage.recipe.coefficients.items()}

    @property
    def models(self) -> dict[str, Transformer]:
        """The parameters of every model as they stand."""
        return self.frozen | {name: state.params for name, state in self.states.items()}

    @property
    def acting(self) -> dict[str, Transformer]:
        """Of those that speak."""
        models = self.models
        return {role.model: models[role.model] for role in self.stage.recipe.roles.values()}

    def learn(self, collected: Collected, step: int) -> Learned:
        """One batch: an optimizer step a minibatch. step: number of the batch, which seeds the order of minibatches."""
        groups, paid = collected.accepted()
        packed, micros = self.pack(groups, paid)
        batches = {name: next(iter(self.programs.updates.values())).put(one.batch) for name, one in packed.items()}
        num_micro = {name: np.int32(number) for name, number in micros.items()}
        coefficients = {name: np.float32(value) for name, value in self.coefficients.items()}
        params = {name: state.params for name, state in self.states.items()}
        prepared = self.programs.prepare(params, self.references, batches, num_micro, coefficients)
        values = {}
        for name, update in self.programs.updates.items():
            read = self.programs.reads[name]
            own = self._steps(
                name, update, prepared.batches[read], prepared.counts[name], micros[read], coefficients, step
            )
            prefix = "" if name == POLICY or len(self.programs.updates) == 1 else f"{name}/"
            values |= {prefix + key: value for key, value in own.items()}
        values |= numbers(jax.device_get(prepared.metrics), {})
        values["micro_batches"] = max(micros.values())
        values |= averaged(processes.gather("episodes", describe(collected, next(iter(packed.values())))))
        values |= {f"coefficient/{name}": value for name, value in self.coefficients.items()}
        played = int(values.pop("episodes"))
        for name, coefficient in self.stage.recipe.coefficients.items():
            self.coefficients[name] = coefficient.following(self.coefficients[name], values, played)
        advantages = {}
        for name, one in packed.items():
            advantages |= unpack(own_rows(prepared.batches[name].weight), one.places)
        return Learned(values, advantages)

    def _steps(self, name: str, update: Update, batch, counts, num_micro: int, coefficients, step: int):
        """Every minibatch of every epoch of one model; its numbers."""
        settings, sums, first, applied = self.stage.settings.update, None, None, []
        for epoch in range(settings.epochs):
            for micros in minibatches(num_micro, settings.minibatches, seed=(step, epoch)):
                self.states[name], new, report = update.step(self.states[name], batch, counts, coefficients, micros)
                sums = new if sums is None else merge(sums, new)
                # The distance to the sampler is that of the policy that played: later minibatches have moved on.
                first = first or {key: value for key, value in new.items() if key.startswith("sampler_learner_gap")}
                applied.append(report)
        assert sums is not None
        host: Metrics
        host, reports = jax.device_get((sums | (first or {}), applied))
        labels = {"role": list(self.roles), "turn": [f"turn_{turn}" for turn in range(MAX_TURNS)]}
        values = numbers(host, labels)
        values |= {each: float(np.mean([getattr(r, each) for r in reports])) for each in ("grad_norm", "learning_rate")}
        values["skipped"] = float(np.sum([r.skipped for r in reports]))
        return with_spread(values)

    def pack(self, groups: Sequence[Group], paid: Sequence[Sequence[Paid]]) -> tuple[dict[str, Packed], dict[str, int]]:
        """This process's rows of the batch of every model that is learned from, and how many micro-batches all have.
        Where they are too few there are twice as many from then on, and that is said: every program is compiled once
        more."""
        recipe, models = self.stage.recipe, list(dict.fromkeys(self.programs.reads.values()))
        counts = processes.gather("groups", [len(groups), sum(len(group.trajectories) for group in groups)])
        first = processes.before([own[0] for own in counts]), processes.before([own[1] for own in counts])
        while True:
            shape, packed, full = self.programs.own_shape(self.max_micro), {}, ""
            try:
                for model in models:
                    packed[model] = pack_rows(
                        groups, paid, self._roles_of(model), recipe.rewards, shape, self._adapters_of(model), first
                    )
            except RowsExhausted as error:
                full = str(error)
            told = processes.gather("rows", [full, *(one.num_micro for one in packed.values())])
            full = max(own[0] for own in told)
            if not full:
                return packed, {model: max(own[number] for own in told) for number, model in enumerate(models, 1)}
            self.max_micro *= 2
            say(
                f"{full}: room for {self.max_micro} from here on (one compilation more; "
                f"--config.{self.stage.name}.update.max_micro={self.max_micro} has it from the start)"
            )

    def _roles_of(self, model: str) -> dict[str, int]:
        return {name: self.roles[name] for name, role in self.stage.recipe.roles.items() if role.model == model}

    def _adapters_of(self, model: str) -> dict[str, int]:
        roles, adapters = self.stage.recipe.roles, self.programs.architectures[model].adapters
        return {name: adapters.number(roles[name].adapter) for name in self._roles_of(model) if roles[name].adapter}

    # -- saving -------------------------------------------------------------------------------------------------------

    def arrays(self) -> dict[str, Any]:
        """What a checkpoint holds; parameters in one place, whether they learn or not."""
        return {
            "params": self.models,
            "optimizer": {name: {"state": s.opt_state, "step": s.step} for name, s in self.states.items()},
            "reference": {name: params for name, params in self.references.items() if params is not None},
        }

    def meta(self) -> dict[str, Any]:
        return {"max_micro": self.max_micro, "coefficients": self.coefficients}

    def restore(self, arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        params = arrays["params"]
        self.frozen = {name: params[name] for name in self.frozen}
        self.states = {
            name: TrainState(params[name], saved["state"], saved["step"]) for name, saved in arrays["optimizer"].items()
        }
        self.references |= arrays["reference"]
        self.max_micro, self.coefficients = meta["max_micro"], dict(meta["coefficients"])


# -- how models begin -------------------------------------------------------------------------------------------------


def architecture_of(a: Architecture, learn: Learn | None) -> Architecture:
    """With a value head where the objective reads one."""
    return replace(a, value_head=learn is not None and "value" in learn.objective.needs)


def begin(models: Mapping[str, Transformer], name: str, a: Architecture, mesh: jax.sharding.Mesh) -> Transformer:
    """The parameters of a model in this stage's architecture."""
    source = name if name in models else POLICY
    if source not in models:
        raise ValueError(
            f"model {name!r} is new in this stage, and there is no {POLICY!r} to copy: {', '.join(models)}"
        )
    params = models[name] if name in models else copied(models[POLICY])
    return jax.device_put(reshaped(params, a), shardings(a, mesh))


def reference(params: Transformer, update: Update, learn: Learn) -> Any:
    """What stands in the reference in place of the parameters that learn: they themselves as they are now, or, for the
    base, adapters that add nothing."""
    if learn.reference == "base" and params.adapters is not None:
        params = params.replace(adapters=silent(params.adapters))  # type: ignore[attr-defined]
    return copied(update.own(params))


def copied(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.copy(), params)


def build_update(stage: Stage, a: Architecture, learn: Learn, mesh: jax.sharding.Mesh, seed: int) -> Update:
    update = stage.settings.update
    o: config.Optimizer = learn.optimizer or update
    steps = stage.steps * update.minibatches * update.epochs
    schedule = build_schedule(o.schedule, o.learning_rate, o.warm_up_steps, steps, o.final_fraction)
    optimizer = build_optimizer(
        schedule, b1=o.b1, b2=o.b2, weight_decay=o.weight_decay, clip_norm=o.clip_norm,
        master=a.param_dtype != "float32",
    )  # fmt: skip
    return Update(a, learn.objective, optimizer, schedule, mesh, learn.trains or update.trains, seed)


def minibatches(num_micro: int, count: int, seed: tuple[int, int]) -> list[list[int]]:
    """Micro-batches in random order, cut into `count` parts (fewer if there are not that many)."""
    if count == 1:
        return [list(range(num_micro))]
    order = np.random.default_rng(seed).permutation(num_micro)
    return [part.tolist() for part in np.array_split(order, min(count, num_micro))]


# -- what is reported -------------------------------------------------------------------------------------------------


def with_spread(values: dict[str, float]) -> dict[str, float]:
    """Second moments turned into what people read: the ratio's standard deviation, and the share of the targets'
    variance that the critic explained before this step learned from them."""
    if "ratio_squared" in values:
        values["ratio_std"] = max(0.0, values.pop("ratio_squared") - values["ratio"] ** 2) ** 0.5
    if "value_error_squared" in values:
        variance = values.pop("value_target_squared") - values["value_target"] ** 2
        error = values.pop("value_error_squared")
        values["explained_variance"] = 1 - error / variance if variance > 1e-8 else 0.0
    return values


def describe(collected: Collected, packed: Packed) -> dict[str, tuple[float, float]]:
    """What the episodes of a batch were like, of all that were played, learned from or not: sums by name and what they
    are over; a count of 0 means that the sum itself is told."""
    trajectories = [t for group in collected.groups for t in group.trajectories]
    payments = [payment for group in collected.paid for payment in group]

    def mean(values: Sequence[float]) -> tuple[float, float]:
        return float(np.sum(values)), float(len(values))

    values = {
        "reward": mean([total_reward(payment) for payment in payments]),
        "fill": (packed.fill, float(bool(packed.places))),
        "trained_tokens": (float((packed.batch.act > 0).sum()), 0.0),
        "left_out": (float(packed.left_out), 0.0),
        "episodes": (float(packed.num_episodes), 0.0),
        "staleness": (float(collected.step - collected.version), 1.0),
        "accepted_groups": mean(collected.accept),
        "searches": mean([t.num_searches for t in trajectories]),
        "truncated": mean([t.status == TRUNCATED for t in trajectories]),
    }
    turns = sum(t.outcome.fields.get("turns", 0) for t in trajectories)
    if turns:
        invalid = sum(t.outcome.fields.get("invalid_turns", 0) for t in trajectories)
        values["legal"] = float(turns - invalid), float(turns)
    for name in sorted({name for payment in payments for name in payment.metrics}):
        values[name] = mean([payment.metrics[name] for payment in payments if name in payment.metrics])
    for status in sorted({t.status for t in trajectories}):
        values[f"status/{status}"] = mean([t.status == status for t in trajectories])
    return values


def averaged(told: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """The numbers of several processes' episodes together. A status that one has not seen counts as 0 there."""
    episodes = sum(each["truncated"][1] for each in told)
    values = {}
    for name in sorted({name for each in told for name in each}):
        total, over = np.sum([each[name] for each in told if name in each], axis=0)
        over = episodes if name.startswith("status/") else over
        values[name] = float(total / over) if over else float(total)
    return values
