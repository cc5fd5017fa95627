"""Your own rows, your own reward: a small model from scratch that answers at once, without search.

    python -m launch.train --config=configs/own_task.py --config.data=rows.jsonl --config.reward=my_rewards.py:reward \
        --workdir=runs/own

Rows are JSONL of {question, answers}, {question, answer: "... #### N"} (GSM8K), {messages} or {prompt}; a solution in a
row is what the warm-up learns to write. docs/guides/your_own_task.md has the rest.
"""

from rlrag.config import Agent, Data, Experiment, Model, Retriever, Reward, Rollout, Stage, Tokenizer, Update

VARIANTS = ("answer", "gsm8k", "smoke")

GSM8K = "../shared/data/continual/gsm8k/train.jsonl.gz"


def get_config(variant: str = "answer") -> Experiment:
    """answer: any rows. gsm8k: grade-school mathematics, by its official rule. smoke: seconds, for tests."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/own_task.py has no variant {variant!r}; there are: {', '.join(VARIANTS)}")
    experiment = answer()
    experiment.name = f"own_task:{variant}"
    if variant == "gsm8k":
        experiment.data.train = GSM8K
        experiment.reward.metric = "gsm8k"
    if variant == "smoke":
        experiment.steps, experiment.warm_up.steps = 2, 2
        experiment.model = Model(
            vocab_size=512, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32
        )
        experiment.tokenizer.train_vocab_size = 300
        experiment.agent.max_tokens, experiment.agent.max_tokens_per_turn = 128, 16
        experiment.rollout.num_slots = experiment.rollout.max_episodes = experiment.rollout.prefill_rows = 8
        for stage in (experiment.warm_up, experiment.main):
            stage.questions, stage.update.row_tokens, stage.update.micro_rows = 2, 128, 4
    return experiment


def answer() -> Experiment:
    warm_up = Update(
        learning_rate=2e-3, schedule="cosine", final_fraction=0.1, warm_up_steps=40, weight_decay=0.01,
        row_tokens=512, micro_rows=4, max_micro=4,
    )  # fmt: skip
    return Experiment(
        name="own_task:answer",
        steps=100,
        model=Model(
            vocab_size=2048, num_layers=3, embed_dim=192, num_heads=4, num_kv_heads=4, head_dim=48, mlp_dim=384,
            embed_scale=192**0.5, scan_unroll=3,
        ),
        data=Data(train="", validation="", test=""),
        tokenizer=Tokenizer(train_vocab_size=2048),
        retriever=Retriever(kind="none"),
        agent=Agent(max_tokens=512, max_tokens_per_turn=200),
        reward=Reward(metric="em"),
        rollout=Rollout(num_slots=64, max_episodes=128, page_size=16, burst=8, prefill_rows=16, prefill_chunk=64),
        best_metric="reward",
        warm_up=Stage(steps=300, questions=16, update=warm_up),
        main=Stage(
            questions=16, group_size=4, evaluate_every=20,
            update=Update(learning_rate=2e-4, row_tokens=512, micro_rows=4, max_micro=16),
        ),
    )  # fmt: skip
