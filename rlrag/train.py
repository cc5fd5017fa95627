"""The outer loop: draw questions, play or demonstrate episodes, learn from them, write, save; at the end, a result."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlrag import config, workdir
from rlrag.checkpoint import Checkpoints, digest
from rlrag.console import LINE_EVERY_S, bar, headline, say
from rlrag.data.sources import iterate
from rlrag.data.task import Task, open_task
from rlrag.evaluate import Shown, bounds, evaluate, summarize, write_rows
from rlrag.learner import Learner
from rlrag.mesh import make_mesh
from rlrag.metrics import Writer, num_rows, rewind
from rlrag.model.architecture import Architecture
from rlrag.model.parameters import Transformer, initialize, num_parameters, shardings
from rlrag.model.transformer import pack
from rlrag.recipes.recipe import Stage
from rlrag.report import describe, draw_curve, versions
from rlrag.rollout.engine import Engine, Play
from rlrag.setup import build_architecture, build_engine, build_stages, check_sizes
from rlrag.trajectory import Example, Group

READ_AHEAD = 4  # batches of demonstrations made while the device works
BEGIN = {"stage": 0, "step": 0, "ended": False, "rows": 0, "tokens": 0, "seconds": 0.0, "result": {}}


@dataclass
class Run:
    """Everything that lives as long as the training, and where it stands."""

    experiment: config.Experiment
    directory: Path
    mesh: jax.sharding.Mesh
    task: Task
    architecture: Architecture
    stages: tuple[Stage, ...]
    engine: Engine
    checkpoints: Checkpoints
    saved: int | None  # the checkpoint that this session goes on from
    meta: Mapping[str, Any]  # what it says; BEGIN where there is none
    writer: Writer
    begun: float = field(default_factory=time.perf_counter)
    tokens: int = 0  # trained on so far
    result: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.tokens, self.result = self.meta["tokens"], dict(self.meta["result"])
        self.key = jax.random.key(self.experiment.seed)
        self.pack_weights = jax.jit(lambda params: pack(params, self.architecture))

    @property
    def seconds(self) -> float:
        """Of this session and those before it."""
        return self.meta["seconds"] + time.perf_counter() - self.begun

    def global_step(self, stage: int, step: int) -> int:
        return sum(s.steps for s in self.stages[:stage]) + step

    def close(self) -> None:
        self.writer.close()
        self.checkpoints.close()
        self.engine.close()


def train(experiment: config.Experiment, directory: Path) -> dict[str, Any]:
    """Train from the start, or from the newest checkpoint in the directory; returns what result.json holds."""
    config.check(experiment)
    workdir.open_workdir(directory, experiment)
    result = workdir.read(directory / "result.json") if workdir.holds_checkpoint(directory) else None
    if result is not None:
        say(f"{directory} holds this run, finished: choose another --workdir to train again")
        say("\n".join(describe(result)))
        return result
    mesh = make_mesh(experiment.mesh.data, experiment.mesh.model)
    with jax.set_mesh(mesh):
        run = set_up(experiment, directory, mesh)
        try:
            return conclude(run, play_stages(run))
        finally:
            run.close()


def set_up(experiment: config.Experiment, directory: Path, mesh: jax.sharding.Mesh) -> Run:
    task = open_task(experiment, directory)
    a, stages = build_architecture(experiment, task), build_stages(experiment, task)
    check_sizes(task, stages, mesh)
    engine = build_engine(experiment, task, a, mesh)
    workdir.write(directory / "config.json", config.to_dict(experiment))
    checkpoints = Checkpoints(directory / "checkpoints")
    saved = checkpoints.latest()
    meta = BEGIN if saved is None else checkpoints.meta(saved)
    rewind(directory / "metrics.jsonl", meta["rows"])
    if saved is None:
        (directory / "result.json").unlink(missing_ok=True)  # of a run that is gone
    say(f"{experiment.name}: {num_parameters(a):,} parameters, {device()}, JAX {jax.__version__}, {directory}")
    if saved is not None:
        say(f"going on from step {meta['step']} of stage {stages[meta['stage']].name}")
    writer = Writer(directory, purge_step=(saved or 0) + 1)
    return Run(experiment, directory, mesh, task, a, stages, engine, checkpoints, saved, meta, writer)


def play_stages(run: Run) -> Transformer:
    """The parameters that the last stage ends with."""
    a = run.architecture
    begin = jax.jit(lambda key: initialize(a, key), out_shardings=shardings(a, run.mesh))
    params = begin(jax.random.fold_in(run.key, 0))
    for number, stage in enumerate(run.stages):
        if number < run.meta["stage"]:
            continue
        learner = Learner(stage, a, run.mesh, run.experiment.rollout.num_kept, params)
        play(run, learner, number)
        params = learner.state.params
        if stage.name == "warm_up":
            run.result["warm_start"] = score(run, params, "warm_start")
    return params


def play(run: Run, learner: Learner, number: int) -> None:
    """One stage to its end, from where the checkpoint left it if that is of this stage."""
    stage, step = learner.stage, 0
    # Every stage draws its own order.
    seed = int(np.random.SeedSequence([run.experiment.seed, number]).generate_state(1)[0])
    batches = iterate(run.task.train, seed=seed, batch_size=stage.settings.questions)
    cursor = batches.get_state()
    if run.saved is not None and number == run.meta["stage"]:
        learner.restore(run.checkpoints.restore(run.saved, learner.arrays()), run.meta["max_micro"])
        step, cursor = run.meta["step"], run.meta["cursor"]
        batches.set_state(cursor)
        if run.meta["ended"]:
            return
    with bar(stage.name, stage.steps, step) as progress, ThreadPoolExecutor(1) as reader:
        for cursor, groups in draw(run, learner, number, step, batches, reader):
            begin = time.perf_counter()
            values = learner.learn(groups, step)
            values["update_s"] = time.perf_counter() - begin
            if stage.demonstrate is None:
                values |= {f"rollout/{name}": value for name, value in run.engine.usage.metrics().items()}
            run.tokens += int(values["trained_tokens"])
            step += 1
            every = stage.settings.evaluate_every
            if every and step % every == 0:
                values |= validate(run, learner)
            run.writer.write(stage.name, step, run.global_step(number, step), values)
            progress.show(**headline(values))
            if reached(stage.settings, values):
                break
            if step % run.experiment.checkpoint_every == 0 and step < stage.steps:
                save(run, learner, number, step, cursor)
    save(run, learner, number, step, cursor, ended=True)


def draw(run: Run, learner: Learner, number: int, first: int, batches: Any, reader: ThreadPoolExecutor) -> Iterator[tuple[Any, list[Group]]]:  # fmt: skip # noqa: E501
    """The groups of every step that is left, with the data cursor behind them. Demonstrations are made ahead by the
    reader; the policy's own episodes are played with the weights of their step."""
    stage, demonstrate = learner.stage, learner.stage.demonstrate

    def demonstrations(examples: Sequence[Example], step: int) -> list[Group]:
        assert demonstrate is not None
        return [Group(example, [demonstrate(example, step)]) for example in examples]

    ahead: list[tuple[Any, Any]] = []
    for step in range(first, stage.steps):
        if demonstrate is None:
            examples = next(batches)
            recipe = stage.recipe
            play = Play(recipe.workflow, recipe.roles, "train", stage.settings.group_size, step, recipe.tools)
            root = jax.random.fold_in(jax.random.fold_in(run.key, number + 1), step)
            weights = {"policy": run.pack_weights(learner.state.params)}
            yield batches.get_state(), list(run.engine.run(weights, examples, play, root))
            continue
        while len(ahead) < READ_AHEAD and step + len(ahead) < stage.steps:
            examples = next(batches)
            ahead.append((batches.get_state(), reader.submit(demonstrations, examples, step + len(ahead))))
        cursor, future = ahead.pop(0)
        yield cursor, future.result()


def validate(run: Run, learner: Learner) -> dict[str, float]:
    weights = {"policy": run.pack_weights(learner.state.params)}
    summary = summarize(evaluate(run.engine, weights, run.task.validation, learner.stage.recipe))
    return {f"validation/{name}": value for name, value in summary.items() if isinstance(value, float)}


def reached(settings: config.Stage, values: Mapping[str, float]) -> bool:
    """Whether the metric that ends a stage early is there and high enough."""
    value = values.get(f"validation/{settings.until_metric}")
    return value is not None and value >= settings.until_value


def save(run: Run, learner: Learner, stage: int, step: int, cursor: Any, ended: bool = False) -> None:
    meta = {
        "stage": stage,
        "step": step,
        "ended": ended,
        "cursor": cursor,
        "rows": num_rows(run.writer.path),
        "tokens": run.tokens,
        "seconds": run.seconds,
        "max_micro": learner.max_micro,
        "result": run.result,
    }
    number = run.global_step(stage, step)
    if run.checkpoints.latest() != number:  # a stage of no steps changes nothing
        run.checkpoints.save(number, learner.arrays(), meta)


def score(run: Run, params: Transformer, name: str) -> dict[str, Any]:
    """Score parameters on the test questions; predictions go to a file. Oracle and random policy frame every score."""
    examples, recipe = run.task.test, run.stages[-1].recipe
    if "oracle" not in run.result:
        run.result |= {"oracle": None, "random": None} | bounds(run.task, examples)
    with bar(f"{name} test", len(examples), first_line_s=LINE_EVERY_S) as progress:
        weights = {"policy": run.pack_weights(params)}
        rows = evaluate(run.engine, weights, examples, recipe, progress=Shown(progress))
    write_rows(run.directory / f"predictions_{name}.jsonl", rows)
    summary = summarize(rows)
    say("\n".join(describe({name: summary, **{policy: run.result[policy] for policy in ("oracle", "random")}})))
    return summary


def device() -> str:
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def conclude(run: Run, params: Transformer) -> dict[str, Any]:
    """Test, draw, and write result.json, last: it says that the run is finished."""
    result = {
        **run.result,
        "final": score(run, params, "final"),
        "seconds": run.seconds,
        "tokens": run.tokens,
        "weights_sha256": digest(params),
        "device": device(),
        "versions": versions(),
        "config": config.to_dict(run.experiment),
    }
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    draw_curve(run.directory / "curve.png", rows, result)
    workdir.write(run.directory / "result.json", result)
    say(f"{result['seconds']:,.0f} s, {run.tokens:,} trained tokens, weights {result['weights_sha256'][:12]}")
    say(f"{run.directory}: result.json, curve.png, metrics.jsonl, tensorboard, predictions_final.jsonl, checkpoints")
    return result
