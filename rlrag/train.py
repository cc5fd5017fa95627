"""The outer loop: draw questions, play or demonstrate episodes, learn from them, write, save; at the end, a result."""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlrag import config, processes, workdir
from rlrag.checkpoint import Checkpoints, digest
from rlrag.collection import Collector, together
from rlrag.console import LINE_EVERY_S, bar, headline, say
from rlrag.data.sources import iterate
from rlrag.data.task import Task, open_task, served
from rlrag.dry_run import Setting, settle
from rlrag.episodes import EpisodeLog
from rlrag.evaluate import Shown, bounds, evaluate, summarize, write_rows
from rlrag.learner import Learner
from rlrag.metrics import Writer, num_rows, rewind, round_for_json
from rlrag.model.architecture import Architecture
from rlrag.model.decoding import DecodeWeights, build_pack
from rlrag.model.folder import KEPT, folder_of, keep_description, locate
from rlrag.model.parameters import Transformer, abstract, initialize, num_parameters, plain, shardings
from rlrag.recipes.recipe import POLICY, WARM_UP, Stage
from rlrag.report import describe, draw_curve, versions
from rlrag.retrieval.index import Index
from rlrag.retrieval.service import open_remote
from rlrag.rollout.engine import Engine
from rlrag.setup import (
    acting_models,
    build_architecture,
    build_engine,
    build_spec,
    build_stages,
    check_sizes,
    furnish,
    load_policy,
    open_mesh,
    resolved,
)
from rlrag.signals import Stopping
from rlrag.trajectory import Group
from rlrag.watch import Alarm, Watchman

BEGIN = {"stage": 0, "step": 0, "ended": False, "rows": 0, "alarms": 0, "episodes": 0, "tokens": 0, "seconds": 0.0}
BEGIN |= {"result": {}, "best": None}
TESTED = 10  # times as many episodes of the last test are logged as of a step
Models = Mapping[str, Transformer]


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
    writer: Writer | None  # of the first process; files that are written once are written by it
    stopping: Stopping
    best: Checkpoints  # the best by held-out score
    episodes: EpisodeLog
    begun: float = field(default_factory=time.perf_counter)
    leaving: bool = False  # all processes know that one was asked to end
    tokens: int = 0  # trained on so far
    result: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.tokens, self.result = self.meta["tokens"], dict(self.meta["result"])
        self.key = jax.random.key(self.experiment.seed)
        self.pack_weights = build_pack(self.architecture, self.mesh)
        self.best_score = self.meta["best"]

    @property
    def seconds(self) -> float:
        """Of this session and those before it."""
        return self.meta["seconds"] + time.perf_counter() - self.begun

    def global_step(self, stage: int, step: int) -> int:
        return sum(s.steps for s in self.stages[:stage]) + step

    def packed(self, models: Models) -> dict[str, DecodeWeights]:
        """What the engine plays with."""
        return {name: self.pack_weights(params) for name, params in models.items()}

    def close(self) -> None:
        with contextlib.ExitStack() as all_of_them:
            for part in (self.writer, self.checkpoints, self.best, self.engine):
                if part is not None:
                    all_of_them.callback(part.close)


def train(experiment: config.Experiment, directory: Path) -> dict[str, Any]:
    """Train from the start, or from the newest checkpoint in the directory; returns what result.json holds."""
    config.check(experiment)
    experiment = resolved(experiment, directory)
    with processes.first_alone():
        workdir.open_workdir(directory, experiment)
    result = workdir.read(directory / "result.json") if workdir.holds_checkpoint(directory) else None
    if result is not None:
        say(f"{directory} holds this run, finished: choose another --workdir to train again")
        say("\n".join(describe(result)))
        return result
    if experiment.warm_start and not workdir.holds_checkpoint(directory):
        workdir.finished(experiment)
    mesh = open_mesh(experiment.mesh)
    # A spawned server is the process's own, and so is its log.
    own = directory if processes.is_first() else directory / f"process_{processes.index()}"
    service = open_remote(experiment.retriever, served(experiment), own)
    with jax.set_mesh(mesh), Stopping() as stopping, service as remote:
        run = set_up(experiment, directory, mesh, stopping, remote)
        try:
            result = conclude(run, play_stages(run))
        except BaseException:
            with contextlib.suppress(Exception):  # on a full disk closing fails too: what failed first is told
                run.close()
            raise
        run.close()
        return result


def set_up(
    experiment: config.Experiment, directory: Path, mesh: jax.sharding.Mesh, stopping: Stopping, remote: Index | None
) -> Run:
    with processes.first_alone():
        if experiment.model.path and (folder := folder_of(experiment.model.path, directory)) != directory / KEPT:
            keep_description(folder, directory / KEPT)
        task = open_task(experiment, directory, remote)
    a, stages = build_architecture(experiment, task), build_stages(experiment, task)
    check_sizes(task, stages, mesh)
    engine = build_engine(experiment, task, a, mesh, acting_models(stages))
    if processes.is_first():
        workdir.write(directory / "config.json", config.to_dict(experiment))
    checkpoints = Checkpoints(directory / "checkpoints")
    saved = checkpoints.latest()
    meta = BEGIN if saved is None else checkpoints.meta(saved)
    writer = None
    if processes.is_first():
        for name in ("metrics", "alarms", "episodes"):
            rewind(directory / f"{name}.jsonl", meta["rows" if name == "metrics" else name])
        if saved is None:
            (directory / "result.json").unlink(missing_ok=True)  # of a run that is gone
        writer = Writer(directory, (saved or 0) + 1, experiment.wandb, experiment.name)
    say(f"{experiment.name}: {num_parameters(a):,} parameters, {device()}, JAX {jax.__version__}, {directory}")
    if saved is not None:
        say(f"going on from step {meta['step']} of stage {stages[meta['stage']].name}")
    best = Checkpoints(directory / "best", keep=1)
    log = EpisodeLog(directory, task.tokenizer.token_bytes())
    return Run(
        experiment, directory, mesh, task, a, stages, engine, checkpoints, saved, meta, writer, stopping, best, log
    )


def play_stages(run: Run) -> Models:
    """The models that the last stage ends with."""
    models: Models = {POLICY: first_policy(run)}
    for number in range(run.meta["stage"], len(run.stages)):
        models = play_stage(run, number, models)
    return models


def play_stage(run: Run, number: int, models: Models) -> Models:
    """One stage with these models; what it ends with. Its optimizer states go with it, before the next has its own."""
    stage = run.stages[number]
    experiment, task, a, mesh, seed = run.experiment, run.task, run.architecture, run.mesh, run.experiment.seed
    spec = build_spec(experiment, task)
    _, programs = settle(Setting(experiment, task, run.stages, stage, a, spec, mesh), seed)
    learner = Learner(stage, a, mesh, spec.num_kept, models, seed, programs)
    play(run, learner, number)
    if stage.name == WARM_UP and not run.experiment.warm_start:
        run.result["warm_start"] = score(run, learner.acting, "warm_start")
    return learner.models


def first_policy(run: Run) -> Transformer:
    """Fresh parameters, those of the model that model.path names, or of the run that `warm_start` names, with the score
    they had."""
    a, path, key = run.architecture, run.experiment.model.path, jax.random.fold_in(run.key, 0)
    if path and not run.experiment.warm_start and run.saved is None:
        return furnish(load_policy(locate(path), a, run.mesh), a, run.mesh, key)
    if not run.experiment.warm_start or run.saved is not None:  # what is saved has both
        return jax.jit(lambda key: initialize(a, key), out_shardings=shardings(a, run.mesh))(key)
    run.result["warm_start"] = workdir.finished(run.experiment)["final"]
    checkpoints = Checkpoints(Path(run.experiment.warm_start) / "checkpoints")
    try:
        step = checkpoints.latest()
        assert step is not None
        if any(path.startswith("adapters.") for path in checkpoints.shapes(step)):
            return checkpoints.restore_params(step, abstract(a, run.mesh))
        return furnish(checkpoints.restore_params(step, abstract(plain(a), run.mesh)), a, run.mesh, key)
    finally:
        checkpoints.close()


def play(run: Run, learner: Learner, number: int) -> None:
    """One stage to its end, from where the checkpoint left it if that is of this stage."""
    stage, step = learner.stage, 0
    watchman = Watchman(run.experiment.watch)
    # Every stage draws its own order.
    seed = int(np.random.SeedSequence([run.experiment.seed, number]).generate_state(1)[0])
    batches = iterate(run.task.train, seed=seed, batch_size=stage.settings.questions)
    meta = run.meta if run.saved is not None and number == run.meta["stage"] else None
    if meta is not None:
        assert run.saved is not None
        learner.restore(run.checkpoints.restore(run.saved, learner.arrays()), meta["learner"])
        watchman.state = meta["watch"]
        step = meta["step"]
        if meta["ended"]:
            return
    root = jax.random.fold_in(run.key, number + 1)
    cursor = batches.get_state()
    with (
        Collector(stage, run.engine, run.mesh, batches, root, step) as collector,
        bar(stage.name, stage.steps, step) as progress,
    ):
        if meta is not None:
            cursor = meta["cursor"]
            collector.restore(cursor, meta["ahead"])
        while step < stage.steps:
            collected = collector.take(step, step, lambda: run.packed(learner.acting))
            begin = time.perf_counter()
            values, advantages = learner.learn(collected, step)
            values["update_s"] = time.perf_counter() - begin
            usage = together(processes.gather("usage", collected.usage))
            values |= {f"rollout/{name}": value for name, value in usage.items()}
            run.tokens += int(values["trained_tokens"])
            cursor = collected.cursor
            step += 1
            log = run.experiment.log_episodes if stage.demonstrate is None else 0
            if processes.is_first():
                run.episodes.write(stage.name, step, *collected.accepted(), log, advantages)
            every = stage.settings.evaluate_every
            if every and step % every == 0:
                collector.settle()
                values |= validate(run, learner, number, step)
            # Demonstrations are what they are: of them only the update is watched.
            watched = values if stage.demonstrate is None else {name: values[name] for name in ("grad_norm", "skipped")}
            values["alarms"] = raise_alarms(run, watchman.look(step, watched), stage.name)
            if run.writer is not None:
                run.writer.write(stage.name, step, run.global_step(number, step), values)
            progress.show(**headline(values))
            if reached(stage.settings, values):
                break
            agree(run)
            due = step % run.experiment.checkpoint_every == 0
            if (due or run.leaving) and step < stage.steps:
                save(run, learner, number, step, cursor, watchman, collector.meta())
            leave_if_asked(run, step < stage.steps)
        save(run, learner, number, step, cursor, watchman, {"ahead": None}, ended=True)
    agree(run)
    leave_if_asked(run, True)


def agree(run: Run) -> None:
    """Whether any process was asked to end: from here on all know, and what one hears later waits for the next time."""
    run.leaving = any(processes.gather("asked", run.stopping.asked))


def leave_if_asked(run: Run, saved: bool) -> None:
    """End the process, without an error, where that was asked for and everything is saved."""
    run.stopping.look()
    if run.leaving and saved:
        say(f"asked to end: saved in {run.directory}, the same command goes on from here")
        raise SystemExit(0)


def raise_alarms(run: Run, alarms: Sequence[Alarm], stage: str) -> int:
    """Say and write what tripped; how many."""
    for alarm in alarms:
        say(f"ALARM  {alarm.text}")
        if processes.is_first():
            with (run.directory / "alarms.jsonl").open("a") as file:
                file.write(json.dumps({"stage": stage, **asdict(alarm), "value": round_for_json(alarm.value)}) + "\n")
    return len(alarms)


def validate(run: Run, learner: Learner, stage: int, step: int) -> dict[str, float]:
    """Scores on the validation questions; the parameters are kept in DIR/best where they are the best so far."""
    rows = evaluate(run.engine, run.packed(learner.acting), run.task.validation, learner.stage.recipe)
    summary = summarize(rows)
    value, best = summary[run.experiment.best_metric], run.best_score
    if best is None or value > best["value"]:
        run.best_score = {"metric": run.experiment.best_metric, "value": value, "stage": stage, "step": step}
        number = run.global_step(stage, step)
        if run.best.latest() != number:  # a step that is played again after a crash finds what it saved
            run.best.save(number, {"params": learner.models}, run.best_score)
    return {f"validation/{name}": value for name, value in summary.items() if isinstance(value, float)}


def reached(settings: config.Stage, values: Mapping[str, float]) -> bool:
    """Whether the metric that ends a stage early is there and high enough."""
    value = values.get(f"validation/{settings.until_metric}")
    return value is not None and value >= settings.until_value


def save(
    run: Run, learner: Learner, stage: int, step: int, cursor: Any, watchman: Watchman, ahead: Mapping[str, Any],
    ended: bool = False,
) -> None:  # fmt: skip
    meta = {
        "stage": stage,
        "step": step,
        "ended": ended,
        "cursor": cursor,
        **ahead,
        "learner": learner.meta(),
        "watch": watchman.state,
        "rows": num_rows(run.directory / "metrics.jsonl"),
        "alarms": num_rows(run.directory / "alarms.jsonl"),
        "episodes": num_rows(run.episodes.path),
        "tokens": run.tokens,
        "seconds": run.seconds,
        "best": run.best_score,
        "result": run.result,
    }
    number = run.global_step(stage, step)
    if run.checkpoints.latest() != number:  # a stage of no steps changes nothing
        run.checkpoints.save(number, learner.arrays(), meta)


def score(run: Run, models: Models, name: str) -> dict[str, Any]:
    """Score parameters on the test questions; predictions go to a file. Oracle and random policy frame every score."""
    examples, recipe = run.task.test, run.stages[-1].recipe
    if "oracle" not in run.result:
        run.result |= {"oracle": None, "random": None} | bounds(run.task, examples)
    with bar(f"{name} test", len(processes.share(examples)), first_line_s=LINE_EVERY_S) as progress:
        shown, groups = Shown(progress), []

        def played(row: Mapping[str, Any], group: Group) -> None:
            shown(row, group)
            if len(groups) < TESTED * run.experiment.log_episodes:
                groups.append(group)
            if processes.count() == 1:  # several have begun the test together, and end it together
                agree(run)
                leave_if_asked(run, True)

        rows = evaluate(run.engine, run.packed(models), examples, recipe, progress=played)
    if processes.is_first():
        if name == "final":
            step = run.stages[-1].steps
            run.episodes.write("test", step, groups, [recipe.reward(group) for group in groups], len(groups))
        write_rows(run.directory / f"predictions_{name}.jsonl", rows)
    summary = summarize(rows)
    say("\n".join(describe({name: summary, **{policy: run.result[policy] for policy in ("oracle", "random")}})))
    return summary


def device() -> str:
    spread = f" in {processes.count()} processes" if processes.count() > 1 else ""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}{spread}"


def conclude(run: Run, models: Models) -> dict[str, Any]:
    """Test, draw, and write result.json, last: it says that the run is finished."""
    acting = {role.model: models[role.model] for role in run.stages[-1].recipe.roles.values()}
    final = score(run, acting, "final")  # first: it adds to the result what frames every score
    result = {
        **run.result,
        "final": final,
        "best": run.best_score,
        "seconds": run.seconds,
        "tokens": run.tokens,
        "weights_sha256": digest(models),
        "device": device(),
        "versions": versions(),
        "config": config.to_dict(run.experiment),
    }
    if processes.is_first():
        rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
        draw_curve(run.directory / "curve.png", rows, result)
        workdir.write(run.directory / "result.json", result)
    say(f"{result['seconds']:,.0f} s, {run.tokens:,} trained tokens, weights {result['weights_sha256'][:12]}")
    say(f"{run.directory}: result.json, curve.png, metrics.jsonl, tensorboard, predictions_final.jsonl, checkpoints")
    return result
