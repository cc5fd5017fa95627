"""The JAX peer, Tunix: its Sampler and its GRPOLearner with the vanilla rollout, in an environment of its own.

python -m launch.peers.tunix --workload=FILE --model=DIR --work=DIR
"""

# pyright: reportMissingImports=false
import argparse
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2.params import create_model_from_safe_tensors

from launch.peers import workloads
from launch.peers.protocol import Channel, Pace, serve
from launch.peers.workloads import CLIP_NORM, END, LEARNING_RATE, PAD, Workload

NO_END = -1  # lengths are forced: no token ends a sequence


def load(folder: Path, mesh: Mesh) -> tuple[Any, Any]:
    """The model and its configuration."""
    shape = workloads.read_shape(folder)
    config = qwen2.ModelConfig(
        num_layers=shape["num_hidden_layers"], vocab_size=shape["vocab_size"], embed_dim=shape["hidden_size"],
        hidden_dim=shape["intermediate_size"], num_heads=shape["num_attention_heads"], head_dim=shape["head_dim"],
        num_kv_heads=shape["num_key_value_heads"], rope_theta=int(shape["rope_parameters"]["rope_theta"]),
        norm_eps=shape["rms_norm_eps"], use_tied_embedding=True, dtype=jnp.float32, param_dtype=jnp.float32,
    )  # fmt: skip
    return create_model_from_safe_tensors(str(folder), config, mesh, jnp.float32), config


def logits(model: Any, tokens: list[int]) -> list[list[float]]:
    ids = jnp.array([tokens])
    causal = jnp.tril(jnp.ones((len(tokens), len(tokens)), bool))[None]
    return np.asarray(model(ids, jnp.arange(len(tokens))[None], None, causal)[0][0], np.float32).tolist()


def sampling(model: Any, config: Any, tokenizer: Any, workload: Workload):
    """A function from a seed to the number of tokens sampled."""
    P, N = workload.prompt_tokens, workload.new_tokens
    cache = CacheConfig(
        cache_size=P + N, num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim
    )
    sampler = Sampler(model, tokenizer, cache)

    def work(seed: int) -> int:
        prompts = workloads.prompts(workload, seed, config.vocab_size)
        out = sampler(
            [prompt for prompt in prompts for _ in range(workload.group)], max_generation_steps=N, max_prompt_length=P,
            temperature=1.0, top_p=1.0, forbidden_tokens=[END, PAD], seed=seed % 2**31,
        )  # fmt: skip
        jax.block_until_ready(out.tokens)
        return sum(len(tokens) for tokens in out.tokens)

    return work


def train(model: Any, tokenizer: Any, workload: Workload, mesh: Mesh, pace: Pace, vocabulary: int, steps: int) -> None:
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
    from tunix.rl.rollout.base_rollout import RolloutConfig

    P, N = workload.prompt_tokens, workload.new_tokens
    cluster = RLCluster(
        actor=model, reference=None, tokenizer=tokenizer,
        cluster_config=ClusterConfig(
            role_to_mesh={role: mesh for role in (Role.ACTOR, Role.REFERENCE, Role.ROLLOUT)}, rollout_engine="vanilla",
            training_config=RLTrainingConfig(
                actor_optimizer=optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.adamw(LEARNING_RATE)),
                eval_every_n_steps=10**6, max_steps=steps, mini_batch_size=workload.prompts,
                train_micro_batch_size=workload.prompts, rollout_micro_batch_size=workload.prompts,
            ),
            rollout_config=RolloutConfig(
                max_tokens_to_generate=N, max_prompt_length=P, kv_cache_size=P + N, temperature=1.0, top_p=1.0,
                eos_tokens=[NO_END],
            ),
        ),
    )  # fmt: skip

    def batches() -> Iterator[dict[str, Any]]:
        """Asked for the next batch when a step has ended, which is then told."""
        for number, questions in enumerate(workloads.endless_prompts(workload, vocabulary, steps)):
            if number:
                jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
                if not pace.step_ended(workload.tokens):
                    return
            yield {"prompts": np.array(questions)}

    def reward(prompts: Any, completions: list[str], **_: Any) -> list[float]:
        # Texts lack end and padding tokens, which are sampled now and then: a few words may be missing.
        words = sum(len(text.split()) for text in completions)
        assert 0.99 * workload.tokens <= words <= workload.tokens, f"{words} of {workload.tokens} tokens: not forced"
        return [workloads.reward(text) for text in completions]

    algorithm = GRPOConfig(num_generations=workload.group, num_iterations=1, beta=0.0, epsilon=0.2)
    GRPOLearner(rl_cluster=cluster, algo_config=algorithm, reward_fns=reward).train(batches())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("workload", "model", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--warm_up", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    channel, workload = Channel(), workloads.load(given.workload)
    mesh = Mesh(np.array(jax.devices()).reshape(1, 1), ("fsdp", "tp"))
    model, config = load(given.model, mesh)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(given.model)
    names = ("google-tunix", "jax", "flax", "optax", "transformers")
    about = {
        "versions": {name: version(name) for name in names},
        "logits": logits(model, tokenizer.encode(workloads.prompts(workload, 0, config.vocab_size)[0])),
    }
    if workload.kind == "generate":
        serve(channel, sampling(model, config, tokenizer, workload), given.warm_up, **about)
    else:
        pace = Pace(channel, given.warm_up, **about)
        train(model, tokenizer, workload, mesh, pace, config.vocab_size, given.steps)


if __name__ == "__main__":
    main()
