"""Our side of the comparison, as a user runs it: python -m launch.peers.ours --workload=FILE --model=DIR --work=DIR

An experiment like any other is set up; decoding is its engine, a GRPO step is a round of its training loop, from one
row of metrics.jsonl to the next.
"""

import argparse
import json
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.peers import workloads
from launch.peers.protocol import Channel, Pace, serve
from launch.peers.workloads import CLIP_NORM, LEARNING_RATE, Workload
from rlrag.agents.workflow import Generate, Mode, Reply
from rlrag.config import Agent, Data, Experiment, Model, Retriever, Reward, Rollout, Stage, Update
from rlrag.trajectory import Example, Outcome

STEPS = 200  # for which there are prompts
NO_END = -1  # lengths are forced: no token ends a turn
STOP = "</answer>"  # which no word of the vocabulary begins: looked for, never found


@dataclass(frozen=True)
class Continuing:
    """A workflow: go on from the question for `limit` tokens."""

    tokenizer: Any
    limit: int
    max_tokens: int

    def __call__(self, example: Example, mode: Mode) -> Generator[Generate, Reply, Outcome]:
        reply = yield Generate("agent", "agent", self.tokenizer.encode(example.question), (STOP,), self.limit)
        return Outcome(reply.text, {"turns": 1, "invalid_turns": 0})


def continuing(tokenizer: Any, agent: Agent) -> Continuing:
    tokenizer.end_id = NO_END
    return Continuing(tokenizer, agent.max_tokens_per_turn, agent.max_tokens)


def reward(answer: str | None, example: Example) -> float:
    return workloads.reward(answer or "")


def experiment(workload: Workload, model: Path, work: Path) -> Experiment:
    """The settings of speed are ours to choose, as a user's: for these lengths, on two CPU cores.

    All episodes of a step begin in one round. A training row holds a prompt and some of its answers: packing shares
    all of a prompt but its last token, which every answer brings itself. Micro-batches of two thousand tokens stay in
    the caches.
    """
    P, N, G = workload.prompt_tokens, workload.new_tokens, workload.group
    answers = min(G, 8)
    row_tokens = P - 1 + answers * (N + 1)
    rows = workload.samples // answers
    micro_rows = max(1, min(rows, 2400 // row_tokens))
    return Experiment(
        name=f"peers:{workload.name}",
        steps=STEPS,
        workflow="launch.peers.ours:continuing",
        checkpoint_every=10 * STEPS,
        model=Model(path=str(model), scan_unroll=4),
        data=Data(*[str(work / "rows.jsonl")] * 3),
        retriever=Retriever(kind="none"),
        agent=Agent(max_tokens=P + N, max_tokens_per_turn=N),
        reward=Reward(function="launch.peers.ours:reward"),
        rollout=Rollout(
            num_slots=workload.samples, max_episodes=workload.samples, page_size=16, burst=64, prefill_rows=32,
            prefill_chunk=16, prefill_chunks=32,
        ),
        main=Stage(
            questions=workload.prompts, group_size=G,
            update=Update(
                learning_rate=LEARNING_RATE, clip_norm=CLIP_NORM, warm_up_steps=0, row_tokens=row_tokens,
                micro_rows=micro_rows, max_micro=-(-rows // micro_rows),
            ),
        ),
    )  # fmt: skip


def chosen(settings: Experiment) -> dict[str, int]:
    """The settings of speed, for the report."""
    rollout = ("num_slots", "page_size", "burst", "prefill_rows", "prefill_chunk", "prefill_chunks")
    update = ("row_tokens", "micro_rows", "max_micro")
    values = {f"rollout.{name}": getattr(settings.rollout, name) for name in rollout}
    return values | {f"update.{name}": getattr(settings.main.update, name) for name in update}


def write_rows(workload: Workload, vocabulary: int, path: Path) -> None:
    """The questions of a training."""
    steps = workloads.endless_prompts(workload, vocabulary, STEPS)
    with path.open("w") as file:
        for number, question in enumerate(question for step in steps for question in step):
            file.write(json.dumps({"id": str(number), "question": question, "answers": ["none"]}) + "\n")


class PacedWriter:
    """Writes a step's metrics as the run's own writer does, then waits until the next step is asked for."""

    def __init__(self, writer: Any, pace: Pace):
        self._writer, self._pace = writer, pace

    def write(self, stage: str, step: int, global_step: int, values: dict[str, float]) -> None:
        self._writer.write(stage, step, global_step, values)
        told = {"update_s": "update_s", "device_s": "rollout/device_s"}
        details = {name: values[key] for name, key in told.items() if key in values}
        if not self._pace.step_ended(int(values["trained_tokens"]), **details):
            raise SystemExit(0)

    def close(self) -> None:
        self._writer.close()


def open_run(settings: Experiment, work: Path) -> Any:
    """What `launch.train` sets up."""
    from rlrag import config, workdir
    from rlrag.setup import open_mesh, resolved
    from rlrag.signals import Stopping
    from rlrag.train import set_up

    directory = work / "run"
    config.check(settings)
    settings = resolved(settings, directory)
    workdir.open_workdir(directory, settings)
    mesh = open_mesh(settings.mesh)
    import jax

    jax.set_mesh(mesh)
    return set_up(settings, directory, mesh, Stopping(), None)


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}


def logits(run: Any, params: Any, tokens: list[int]) -> list[list[float]]:
    """Of the training model, after every token of a prompt."""
    import jax
    import jax.numpy as jnp

    from rlrag.model.transformer import trunk

    ids = jnp.array([tokens])
    one = jnp.ones_like(ids), jnp.zeros((1, 2), jnp.int32)  # one segment, without a parent
    positions = jnp.arange(ids.shape[1])[None]
    hidden = jax.jit(lambda params: trunk(params, run.architecture, ids, positions, *one))(params)
    return (hidden[0] @ params.output_head.T).tolist()


def decoding(run: Any, params: Any, workload: Workload):
    """A function from a seed to the number of tokens sampled: weights packed, every prompt played by the engine."""
    import jax

    from rlrag.recipes.recipe import POLICY
    from rlrag.rollout.engine import Play

    recipe = run.stages[-1].recipe
    play = Play(recipe.workflow, recipe.roles, "train", workload.group, 0, recipe.tools)

    def work(seed: int) -> int:
        questions = workloads.prompts(workload, seed, run.architecture.vocab_size)
        examples = [Example(f"{seed} {number}", question, ()) for number, question in enumerate(questions)]
        root = jax.random.fold_in(run.key, seed % 2**31)
        groups = list(run.engine.run(run.packed({POLICY: params}), examples, play, root))
        return sum(t.streams[0].num_tokens - workload.prompt_tokens for g in groups for t in g.trajectories)

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("workload", "model", "work"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--warm_up", type=int, default=2)
    given = parser.parse_args()
    channel = Channel()
    workload, model, work = workloads.load(given.workload), Path(given.model), Path(given.work)
    write_rows(workload, workloads.vocabulary_of(model), work / "rows.jsonl")
    settings = experiment(workload, model, work)
    run = open_run(settings, work)

    from rlrag.learner import Learner
    from rlrag.recipes.recipe import POLICY
    from rlrag.train import first_policy, play

    params = first_policy(run)
    tokens = run.task.tokenizer.encode(workloads.prompts(workload, 0, run.architecture.vocab_size)[0])
    about = {"versions": versions(), "logits": logits(run, params, tokens), "settings": chosen(settings)}
    try:
        if workload.kind == "generate":
            serve(channel, decoding(run, params, workload), given.warm_up, **about)
            return
        number = len(run.stages) - 1
        learner = Learner(run.stages[number], run.architecture, run.mesh, 0, {POLICY: params}, settings.seed)
        run.writer = PacedWriter(run.writer, Pace(channel, given.warm_up, **about))
        play(run, learner, number)
    finally:
        run.close()


if __name__ == "__main__":
    main()
