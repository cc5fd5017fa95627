"""Published shapes at the sizes of real trainings, to be planned before any device is asked for.

python -m launch.plan --config=configs/scale.py:qwen2.5-7b --mesh=data:16,model:4 --device=h200

The sizes are those of the models' own config.json. The questions are the embedded world's and only give the programs
their shapes: episodes of up to 4,096 tokens.
"""

from dataclasses import replace
from typing import NamedTuple

from rlrag.config import Agent, Experiment, Mesh, Model, Retriever, Rollout, Stage, Update

# Of Qwen2.5 (arXiv 2412.15115); common to all: biases of q, k, v, theta 1e6, epsilon 1e-6, heads as listed.
COMMON = Model(
    qkv_bias=True, rope_theta=1e6, norm_epsilon=1e-6, dtype="bfloat16", param_dtype="bfloat16", remat="all",
)  # fmt: skip
TOKENS = 4096  # of an episode at most, and of a row


class Size(NamedTuple):
    """The sizes of a model, and a mesh on which it can be planned."""

    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    vocab_size: int
    tied: bool
    mesh: tuple[int, int]  # data, model


VARIANTS = {
    "qwen2.5-0.5b": Size(24, 896, 14, 2, 64, 4864, 151936, True, (8, 1)),
    "qwen2.5-3b": Size(36, 2048, 16, 2, 128, 11008, 151936, True, (16, 2)),
    "qwen2.5-7b": Size(28, 3584, 28, 4, 128, 18944, 152064, False, (16, 4)),
    "qwen2.5-32b": Size(64, 5120, 40, 8, 128, 27648, 152064, False, (32, 8)),
}


def get_config(variant: str = "qwen2.5-0.5b") -> Experiment:
    """GRPO with a KL to the reference, 64 questions by 8 samples a step."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/scale.py has no variant {variant!r}; there are: {', '.join(VARIANTS)}")
    sizes = VARIANTS[variant]
    data, model = sizes.mesh
    shape = {name: value for name, value in sizes._asdict().items() if name != "mesh"}
    update = Update(learning_rate=1e-6, row_tokens=TOKENS, micro_rows=data, max_micro=-(-512 // data), max_segments=16)
    main = Stage(questions=64, group_size=8, update=update)
    main.loss.kl = 1e-3
    return Experiment(
        name=f"scale:{variant}",
        model=replace(COMMON, **shape),
        mesh=Mesh(data, model),
        agent=Agent(max_tokens=TOKENS, max_tokens_per_turn=1024),
        retriever=Retriever(kind="world"),
        rollout=Rollout(
            num_slots=8 * data, max_episodes=512, page_size=16, burst=32, prefill_rows=2 * data, prefill_chunk=256,
        ),
        warm_up=Stage(update=replace(update)),
        main=main,
    )  # fmt: skip
