"""Experiments of seconds, for tests of the whole loop."""

from dataclasses import replace

from rlrag.config import Data, Experiment, Model, Rollout, Stage, Update


def tiny() -> Experiment:
    """Every size as small as the loop allows; it learns nothing, and is not taught enough to search."""
    update = Update(learning_rate=1e-3, warm_up_steps=2, row_tokens=96, micro_rows=4, max_micro=4)
    return Experiment(
        name="tiny",
        steps=4,
        checkpoint_every=2,
        model=Model(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32),
        data=Data(
            train="world:multihop?split=train&n=100000",
            validation="world:multihop?split=validation&n=8",
            test="world:multihop?split=test&n=8",
        ),
        rollout=Rollout(num_slots=8, max_episodes=16, prefill_rows=8),
        warm_up=Stage(steps=4, questions=4, update=update),
        main=Stage(questions=4, group_size=4, evaluate_every=2, update=replace(update)),
    )


def taught() -> Experiment:
    """Wide enough, and warmed up for long enough, that the policy searches."""
    experiment = tiny()
    experiment.name, experiment.checkpoint_every = "taught", 50
    experiment.model = replace(experiment.model, embed_dim=32, num_heads=4, num_kv_heads=4, mlp_dim=64, embed_scale=5.7)
    update = Update(learning_rate=1e-2, warm_up_steps=10, row_tokens=96, micro_rows=16, max_micro=2)
    experiment.warm_up = Stage(steps=100, questions=32, update=update)
    return experiment
