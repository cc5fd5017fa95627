"""The outer loop: draw examples, play or demonstrate, reward, pack, prepare, accumulate, apply, write, save."""

import hashlib
import importlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlrag import config
from rlrag.checkpoint import Checkpoints
from rlrag.console import bar, say
from rlrag.data.sources import iterate
from rlrag.data.task import Task, open_task
from rlrag.evaluate import evaluate, mean_reward, play_script, summarize, write_rows
from rlrag.mesh import make_mesh
from rlrag.metrics import Metrics, Writer, merge, num_rows, rewind
from rlrag.model.architecture import Architecture
from rlrag.model.parameters import Transformer, initialize, num_parameters, shardings
from rlrag.model.transformer import DecodeWeights, pack
from rlrag.objectives.update import TrainState, Update, build_optimizer, build_prepare, build_schedule
from rlrag.packing import Packed, RowsExhausted, Shape
from rlrag.packing import pack as pack_rows
from rlrag.recipes.recipe import Recipe, Stage
from rlrag.retrieval.client import InProcess
from rlrag.rewards.paid import Paid
from rlrag.rollout.advance import Spec
from rlrag.rollout.decoder import Decoder
from rlrag.rollout.engine import Engine, Play
from rlrag.trajectory import Example, Group

READ_AHEAD = 4  # batches of demonstrations made while the device works


@dataclass
class Run:
    """Everything that lives as long as the training: devices, task, programs of sampling, files."""

    experiment: config.Experiment
    workdir: Path
    mesh: jax.sharding.Mesh
    task: Task
    architecture: Architecture
    stages: tuple[Stage, ...]
    engine: Engine
    pack_weights: Callable[[Transformer], DecodeWeights]
    writer: Writer
    checkpoints: Checkpoints
    key: jax.Array
    tokens: int = 0  # sampled or demonstrated tokens trained on so far
    seconds: float = 0.0  # training time of earlier sessions
    begun: float = field(default_factory=time.perf_counter)
    result: dict[str, Any] = field(default_factory=dict)


def build_stages(experiment: config.Experiment, task: Task) -> tuple[Stage, ...]:
    """The stages of the recipe an experiment names as module:function."""
    module, _, function = experiment.recipe.partition(":")
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"recipe is {experiment.recipe!r}, which cannot be loaded ({error}): name module:function") from None
    return build(experiment, task)


def build_engine(experiment: config.Experiment, task: Task, a: Architecture, mesh: jax.sharding.Mesh) -> Engine:
    """The rollout engine of an experiment with its retriever."""
    r = experiment.rollout
    page = r.page_size
    max_tokens = -(-task.workflow.max_tokens // page) * page
    spec = Spec(
        num_slots=r.num_slots,
        num_pages=r.num_pages or 2 * r.num_slots * (max_tokens // page),
        page_size=page,
        max_tokens=max_tokens,
        burst=r.burst,
        prefill_rows=r.prefill_rows,
        prefill_chunk=r.prefill_chunk,
        prefill_chunks=r.prefill_chunks,
        num_kept=r.num_kept,
    )
    decoder = Decoder(a, spec, task.tokenizer.token_bytes(), task.tokenizer.end_id, mesh, r.max_stop_states)
    retriever = InProcess(
        task.index,
        cache_size=experiment.retriever.cache_size,
        deadline_s=experiment.retriever.deadline_s,
        latency_s=experiment.retriever.latency_s,
    )
    return Engine(
        {"policy": decoder}, task.tokenizer.decode, retriever,
        max_episodes=r.max_episodes, search_threads=r.search_threads, search_batch=r.search_batch,
    )  # fmt: skip


def train(experiment: config.Experiment, workdir: Path) -> dict[str, Any]:
    """Train from the start or from the newest checkpoint in workdir; returns what result.json holds."""
    workdir.mkdir(parents=True, exist_ok=True)
    check_config(experiment, workdir)
    mesh = make_mesh(experiment.mesh.data, experiment.mesh.model)
    with jax.set_mesh(mesh):
        return play_stages(set_up(experiment, workdir, mesh))


def check_config(experiment: config.Experiment, workdir: Path) -> None:
    """A run directory belongs to one configuration."""
    path = workdir / "config.json"
    text = config.to_json(experiment)
    if path.exists() and path.read_text() != text:
        old, new = json.loads(path.read_text()), json.loads(text)
        changed = ", ".join(differences(old, new)) or "its layout"
        raise ValueError(f"{workdir} holds a run with another configuration ({changed}): choose another --workdir")
    path.write_text(text)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    changed = []
    for name in sorted({*old, *new}):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            changed += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            changed.append(f"{prefix}{name}: {a!r} there, {b!r} now")
    return changed


def set_up(experiment: config.Experiment, workdir: Path, mesh: jax.sharding.Mesh) -> Run:
    task = open_task(experiment)
    a = replace(experiment.model, vocab_size=max(experiment.model.vocab_size, task.tokenizer.vocab_size))
    stages = build_stages(experiment, task)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    say(f"{experiment.name}: {num_parameters(a):,} parameters, {device}, JAX {jax.__version__}, {workdir}")
    return Run(
        experiment=experiment,
        workdir=workdir,
        mesh=mesh,
        task=task,
        architecture=a,
        stages=stages,
        engine=build_engine(experiment, task, a, mesh),
        pack_weights=jax.jit(lambda params: pack(params, a)),
        writer=Writer(workdir),
        checkpoints=Checkpoints(workdir / "checkpoints"),
        key=jax.random.key(experiment.seed),
    )


def play_stages(run: Run) -> dict[str, Any]:
    a = run.architecture
    params = jax.jit(lambda key: initialize(a, key), out_shardings=shardings(a, run.mesh))(jax.random.fold_in(run.key, 0))
    saved = run.checkpoints.latest()
    meta = run.checkpoints.meta(saved) if saved is not None else {"stage": 0, "step": 0}
    for number, stage in enumerate(run.stages):
        if number < meta["stage"]:
            continue
        learner = Learner(run, stage, number, params)
        if saved is not None and number == meta["stage"]:
            learner.restore(saved, meta)
        learner.play()
        params = learner.state.params
        if stage.name == "warm_up":
            run.result["warm_start"] = test(run, params, "warm start")
    return finish(run, params)


class Learner:
    """One stage being played."""

    def __init__(self, run: Run, stage: Stage, number: int, params: Transformer):
        self.run, self.stage, self.number, self.step = run, stage, number, 0
        update, a = stage.settings.update, run.architecture
        self.schedule = build_schedule(
            update.schedule, update.learning_rate, update.warm_up_steps, stage.steps * update.minibatches * update.epochs,
            update.final_fraction,
        )  # fmt: skip
        optimizer = build_optimizer(
            self.schedule, b1=update.b1, b2=update.b2, weight_decay=update.weight_decay, clip_norm=update.clip_norm
        )
        objective = stage.recipe.learn["policy"]
        self.update = Update(a, objective, optimizer, self.schedule, run.mesh)
        episodes = stage.settings.questions * stage.settings.group_size
        self.prepare = build_prepare(
            {"policy": a}, {"policy": objective}, stage.recipe.credit, stage.settings.questions, episodes
        )
        self.reference = jax.tree.map(lambda x: x.copy(), params) if objective.needs_reference else None
        self.state: TrainState = self.update.initialize(params)
        self.roles = {name: index for index, name in enumerate(stage.recipe.roles)}
        self.max_micro = update.max_micro
        # Every stage draws its own order.
        seed = int(np.random.SeedSequence([run.experiment.seed, number]).generate_state(1)[0])
        self.batches = iterate(run.task.train, seed=seed, batch_size=stage.settings.questions)
        self.cursor = self.batches.get_state()

    # -- the loop -----------------------------------------------------------------------------------------------

    def play(self) -> None:
        stage, run, every = self.stage, self.run, self.stage.settings.evaluate_every
        with bar(stage.name, stage.steps, self.step) as progress, ThreadPoolExecutor(1) as reader:
            for cursor, groups in self.groups(reader):
                begin = time.perf_counter()
                values = self.learn(groups)
                values["update_s"] = time.perf_counter() - begin
                self.step += 1
                self.cursor = cursor
                if every and self.step % every == 0:
                    values |= {f"validation/{k}": v for k, v in self.validate().items()}
                run.writer.write(stage.name, self.step, self.global_step, values)
                progress.show(**headline(values))
                if self.reached(values):
                    break
                if self.step % run.experiment.checkpoint_every == 0 and stage.demonstrate is None:
                    self.save()
        self.save()

    def groups(self, reader: ThreadPoolExecutor) -> Iterator[tuple[Any, list[Group]]]:
        """The groups of every step that is left, with the data cursor behind them."""
        stage = self.stage
        if stage.demonstrate is None:
            while self.step < stage.steps:
                examples = next(self.batches)
                yield self.batches.get_state(), self.roll_out(examples)
            return
        ahead = []
        for step in range(self.step, stage.steps):
            while len(ahead) < READ_AHEAD and step + len(ahead) < stage.steps:
                examples = next(self.batches)
                ahead.append((self.batches.get_state(), reader.submit(self.demonstrations, examples, step + len(ahead))))
            cursor, future = ahead.pop(0)
            yield cursor, future.result()

    def demonstrations(self, examples: Sequence[Example], step: int) -> list[Group]:
        demonstrate = self.stage.demonstrate
        assert demonstrate is not None
        return [Group(example, [demonstrate(example, step)]) for example in examples]

    def roll_out(self, examples: Sequence[Example]) -> list[Group]:
        recipe, run = self.stage.recipe, self.run
        play = Play(recipe.workflow, recipe.roles, "train", self.stage.settings.group_size, version=self.step)
        root = jax.random.fold_in(jax.random.fold_in(run.key, self.number + 1), self.step)
        return list(run.engine.run({"policy": run.pack_weights(self.state.params)}, examples, play, root))

    def learn(self, groups: list[Group]) -> dict[str, float]:
        """One batch: pack, prepare, and an optimizer step a minibatch."""
        recipe, update = self.stage.recipe, self.stage.settings.update
        paid = [recipe.reward(group) for group in groups]
        packed = self.pack(groups, paid)
        batch = self.update.put(packed.batch)
        prepared = self.prepare(
            {"policy": self.state.params}, {"policy": self.reference}, {"policy": batch}, {"policy": np.int32(packed.num_micro)}
        )  # fmt: skip
        sums: Metrics | None = None
        applied = []
        for epoch in range(update.epochs):
            for micros in minibatches(packed.num_micro, update.minibatches, seed=(self.step, epoch)):
                self.state, new, report = self.update.step(
                    self.state, prepared.batches["policy"], prepared.counts["policy"], micros
                )
                sums = new if sums is None else merge(sums, new)
                applied.append(report)
        assert sums is not None
        metrics, reports, credit = jax.device_get(({k: v.value() for k, v in sums.items()}, applied, prepared.metrics))
        values = {name: float(value) for name, value in metrics.items()}
        values |= {name: float(value.value()) for name, value in credit.items()}
        values |= {name: float(np.mean([getattr(r, name) for r in reports])) for name in ("grad_norm", "learning_rate")}
        values["skipped"] = float(np.sum([r.skipped for r in reports]))
        return values | self.describe(groups, paid, packed)

    def pack(self, groups: list[Group], paid: list[list[Paid]]) -> Packed:
        update, run = self.stage.settings.update, self.run
        while True:
            shape = Shape(
                update.micro_rows, update.row_tokens, update.max_segments, self.max_micro,
                run.experiment.rollout.num_kept, len(self.stage.recipe.rewards),
            )  # fmt: skip
            try:
                return pack_rows(groups, paid, self.roles, self.stage.recipe.rewards, shape)
            except RowsExhausted as full:
                self.max_micro *= 2
                say(f"{full}: room for {self.max_micro} from here on (one compilation more; set update.max_micro)")

    def describe(self, groups: list[Group], paid: list[list[Paid]], packed: Packed) -> dict[str, float]:
        """What the episodes were like."""
        trajectories = [t for group in groups for t in group.trajectories]
        trained = int((packed.batch.act > 0).sum())
        self.run.tokens += trained
        values = {
            "reward": mean_reward(groups, paid),
            "fill": packed.fill,
            "micro_batches": packed.num_micro,
            "trained_tokens": trained,
            "left_out": packed.left_out,
            "searches": float(np.mean([t.num_searches for t in trajectories])),
        }
        names = {name for payments in paid for p in payments for name in p.metrics}
        for name in sorted(names):
            values[name] = float(np.mean([p.metrics[name] for payments in paid for p in payments if name in p.metrics]))
        for status in sorted({t.status for t in trajectories}):
            values[f"status/{status}"] = float(np.mean([t.status == status for t in trajectories]))
        if self.stage.demonstrate is None:
            values |= {f"rollout/{name}": value for name, value in self.run.engine.usage.metrics().items()}
        return values

    def validate(self) -> dict[str, float]:
        run = self.run
        weights = {"policy": run.pack_weights(self.state.params)}
        summary = summarize(evaluate(run.engine, weights, run.task.validation, self.stage.recipe))
        return {name: value for name, value in summary.items() if isinstance(value, float)}

    def reached(self, values: Mapping[str, float]) -> bool:
        metric = self.stage.settings.until_metric
        value = values.get(f"validation/{metric}", -math.inf)
        return bool(metric) and value >= self.stage.settings.until_value

    # -- saving -------------------------------------------------------------------------------------------------

    @property
    def global_step(self) -> int:
        return sum(stage.steps for stage in self.run.stages[: self.number]) + self.step

    def save(self) -> None:
        run = self.run
        meta = {
            "stage": self.number,
            "step": self.step,
            "cursor": self.cursor,
            "rows": num_rows(run.writer.path),
            "tokens": run.tokens,
            "seconds": run.seconds + time.perf_counter() - run.begun,
            "max_micro": self.max_micro,
            "result": run.result,
        }
        run.checkpoints.save(self.global_step, self.arrays(), meta)

    def arrays(self) -> dict[str, Any]:
        return {"state": self.state} | ({} if self.reference is None else {"reference": self.reference})

    def restore(self, saved: int, meta: Mapping[str, Any]) -> None:
        arrays = self.run.checkpoints.restore(saved, self.arrays())
        self.state, self.reference = arrays["state"], arrays.get("reference")
        self.step, self.cursor, self.max_micro = meta["step"], meta["cursor"], meta["max_micro"]
        self.batches.set_state(self.cursor)
        self.run.tokens, self.run.seconds, self.run.result = meta["tokens"], meta["seconds"], meta["result"]
        rewind(self.run.writer.path, meta["rows"])
        say(f"going on from step {self.step} of stage {self.stage.name}")


def minibatches(num_micro: int, count: int, seed: tuple[int, int]) -> list[list[int]]:
    """Micro-batches in random order, cut into `count` parts (fewer if there are not that many)."""
    if count == 1:
        return [list(range(num_micro))]
    order = np.random.default_rng(seed).permutation(num_micro)
    return [part.tolist() for part in np.array_split(order, min(count, num_micro))]


def headline(values: Mapping[str, float]) -> dict[str, str]:
    """The numbers worth watching."""
    shown = {}
    if "rollout/tokens_per_s" in values:
        shown |= {"reward": f"{values['reward']:.3f}", "EM": f"{values['em']:.3f}"}
        shown |= {"searches": f"{values['searches']:.2f}", "tok/s": f"{values['rollout/tokens_per_s']:,.0f}"}
    elif "loss/nll" in values:
        shown["nll"] = f"{values['loss/nll']:.3f}"
    if "validation/em" in values:
        shown["held-out EM"] = f"{values['validation/em']:.3f}"
    return shown


def test(run: Run, params: Transformer, name: str) -> dict[str, Any]:
    """Score parameters on the test questions; predictions go to a file."""
    recipe = run.stages[-1].recipe
    rows = evaluate(run.engine, {"policy": run.pack_weights(params)}, run.task.test, recipe)
    write_rows(run.workdir / f"predictions_{name.replace(' ', '_')}.jsonl", rows)
    summary = summarize(rows)
    low, high = summary["em_interval"]
    say(f"{name}: held-out EM {summary['em']:.3f} [{low:.3f}, {high:.3f}], {summary['searches']:.2f} searches a question")
    return summary


def bounds(task: Task) -> dict[str, Any]:
    """Scores of the task's scripted policies on the test questions; None where the task has none."""
    scores: dict[str, Any] = {"oracle": None, "random": None}
    for name, script_of in task.bounds.items():
        scores[name] = summarize(play_script(task, task.test, script_of))
    return scores


def finish(run: Run, params: Transformer) -> dict[str, Any]:
    from rlrag.report import draw_curve, versions

    final = test(run, params, "final")
    result = {
        **run.result,
        "final": final,
        **bounds(run.task),
        "seconds": run.seconds + time.perf_counter() - run.begun,
        "tokens": run.tokens,
        "weights_sha256": weights_sha256(params),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": versions(),
        "config": config.to_dict(run.experiment),
    }
    (run.workdir / "result.json").write_text(json.dumps(result, indent=1))
    draw_curve(run.workdir, result)
    for name in ("oracle", "random"):
        if result[name]:
            say(f"{name}: held-out EM {result[name]['em']:.3f}")
    run.writer.close()
    run.checkpoints.close()
    run.engine.close()
    say(f"{result['seconds']:.0f} s, {run.tokens:,} trained tokens; {run.workdir / 'result.json'}, curve.png, metrics.jsonl")
    return result


def weights_sha256(params: Transformer) -> str:
    """A hash of every parameter's name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        value = np.asarray(jax.device_get(leaf))
        digest.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
