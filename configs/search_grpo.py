"""A search agent on the embedded multi-hop world: warm-up on imperfect demonstrations, then GRPO.

python -m launch.train --config=configs/search_grpo.py:demo --workdir=runs/demo
"""

from rlrag.config import Data, Experiment, Model, Retriever, Rollout, Stage, Update

VARIANTS = ("demo", "supervised")


def get_config(variant: str = "demo") -> Experiment:
    """demo: learns to search in minutes on two CPU cores.
    supervised: its warm start, continued by supervised learning for at least the time that GRPO takes.
    """
    if variant not in VARIANTS:
        raise ValueError(f"configs/search_grpo.py has no variant {variant!r}; there are: {', '.join(VARIANTS)}")
    experiment = demo()
    if variant == "supervised":
        experiment.name = "search_grpo:supervised"
        experiment.recipe = "rlrag.recipes.search_grpo:build_supervised"
        # Goes on at the learning rate the warm-up ended with; a step costs about a sixth of a step of GRPO.
        experiment.steps = 1000
        experiment.main = Stage(
            questions=64,
            evaluate_every=100,
            update=Update(
                learning_rate=4e-4, warm_up_steps=0, weight_decay=0.01, row_tokens=96, micro_rows=28, max_micro=1
            ),
        )
    return experiment


def demo() -> Experiment:
    world = "world:multihop"
    return Experiment(
        name="search_grpo:demo",
        steps=120,
        # Two layers are enough to look a passage up; two kv heads read as well as eight and decode faster.
        model=Model(
            num_layers=2, embed_dim=128, num_heads=8, num_kv_heads=2, head_dim=16, mlp_dim=320,
            embed_scale=128**0.5, scan_unroll=2,
        ),
        data=Data(
            train=f"{world}?split=train&seed=0&n=1000000",
            validation=f"{world}?split=validation&seed=0&n=256",
            test=f"{world}?split=test&seed=0&n=512",
        ),
        retriever=Retriever(spawn=True),
        rollout=Rollout(num_slots=256, max_episodes=512, page_size=8, burst=6, prefill_rows=128, prefill_chunk=16),
        warm_up=Stage(
            steps=1700,
            questions=64,
            # Fewer steps and some seeds cannot read yet: GRPO then has nothing to reward.
            update=Update(
                learning_rate=4e-3, schedule="cosine", final_fraction=0.1, warm_up_steps=60, weight_decay=0.01,
                row_tokens=96, micro_rows=28, max_micro=1,
            ),
        ),
        main=Stage(
            questions=32,
            group_size=8,
            evaluate_every=10,
            update=Update(learning_rate=5e-4, warm_up_steps=10, row_tokens=96, micro_rows=36, max_micro=8),
        ),
    )  # fmt: skip
