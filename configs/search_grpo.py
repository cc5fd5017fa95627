"""A search agent on the embedded multi-hop world: warm-up on imperfect demonstrations, then GRPO.

    python -m launch.train --config=configs/search_grpo.py:demo --workdir=runs/demo
"""

from rlrag.config import Data, Experiment, Rollout, Stage, Update
from rlrag.model.architecture import Architecture

VARIANTS = ("demo", "supervised")


def get_config(variant: str = "demo") -> Experiment:
    """demo: learns to search in minutes on two CPU cores. supervised: the same warm start, continued without RL."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/search_grpo.py has no variant {variant!r}; there are: {', '.join(VARIANTS)}")
    experiment = demo()
    if variant == "supervised":
        experiment.name = "search_grpo:supervised"
        experiment.recipe = "rlrag.recipes.search_grpo:build_supervised"
    return experiment


def demo() -> Experiment:
    warm_up = Update(
        learning_rate=4e-3, schedule="cosine", final_fraction=0.1, warm_up_steps=45, weight_decay=0.01,
        micro_rows=32, max_micro=1,
    )  # fmt: skip
    return Experiment(
        name="search_grpo:demo",
        steps=200,
        model=Architecture(num_layers=2, embed_dim=128, num_heads=8, num_kv_heads=8, head_dim=16, mlp_dim=320,
                           embed_scale=128**0.5, scan_unroll=2),
        data=Data(
            train="world:multihop?split=train&seed=0&n=1000000",
            validation="world:multihop?split=validation&seed=0&n=256",
            test="world:multihop?split=test&seed=0&n=512",
        ),
        rollout=Rollout(num_slots=256, max_episodes=512, page_size=8, burst=6, prefill_rows=128, prefill_chunk=16),
        warm_up=Stage(steps=900, questions=64, update=warm_up),
        main=Stage(
            questions=32,
            group_size=8,
            evaluate_every=20,
            update=Update(learning_rate=5e-4, warm_up_steps=10, micro_rows=32, max_micro=8),
        ),
    )  # fmt: skip
