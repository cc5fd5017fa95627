"""A search agent on real questions and real passages: a small model from scratch, warm-up on traces, then GRPO.

    python -m launch.train --config=configs/multihop.py --workdir=runs/multihop

Questions of HotpotQA, 2WikiMultiHopQA and MuSiQue, BM25 over their pooled passages. The paths are those of the data
beside the repository, seen from its root; others by `--config.data.train=FILE?...` and `--config.retriever.corpus=FILE`.
The test part is the published dev split; it chooses nothing. What chooses is a validation part cut from train.
"""

from rlrag.config import Agent, Data, Experiment, Retriever, Reward, Rollout, Stage, Tokenizer, Update
from rlrag.model.architecture import Architecture

VARIANTS = ("bm25", "smoke")

QUESTIONS = "../shared/data/corpus/questions.jsonl.gz"
CORPUS = "../shared/data/corpus/passages.jsonl.gz"
SETS = "dataset=hotpotqa,2wikimultihopqa,musique"


def get_config(variant: str = "bm25") -> Experiment:
    """bm25: the whole loop on two CPU cores. smoke: the same in seconds, for tests; it learns nothing."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/multihop.py has no variant {variant!r}; there are: {', '.join(VARIANTS)}")
    experiment = bm25()
    if variant == "smoke":
        shrink(experiment)
    return experiment


def bm25() -> Experiment:
    warm_up = Update(
        learning_rate=1e-3, schedule="cosine", final_fraction=0.1, warm_up_steps=40, weight_decay=0.01,
        row_tokens=768, micro_rows=8, max_micro=4,
    )  # fmt: skip
    main = Update(learning_rate=1e-4, warm_up_steps=5, row_tokens=768, micro_rows=8, max_micro=12)
    return Experiment(
        name="multihop:bm25",
        steps=40,
        checkpoint_every=10,
        model=Architecture(vocab_size=4096, num_layers=4, embed_dim=256, num_heads=8, num_kv_heads=2, head_dim=32,
                           mlp_dim=768, embed_scale=16.0),
        data=Data(
            train=f"{QUESTIONS}?split=train&{SETS}&seed=0&skip=64",
            validation=f"{QUESTIONS}?split=train&{SETS}&seed=0&n=64",
            test=f"{QUESTIONS}?split=dev&{SETS}&seed=0&n=300",
        ),
        tokenizer=Tokenizer(train_vocab_size=4096),
        retriever=Retriever(kind="bm25", corpus=CORPUS),
        agent=Agent(
            k=3, max_turns=4, max_searches=3, max_tokens_per_turn=64, max_tokens=768, max_answer_tokens=24,
            max_observation_tokens=192, instruction="Question: {question}\n",
        ),
        reward=Reward(metric="f1"),
        rollout=Rollout(num_slots=64, max_episodes=128, page_size=16, burst=8, prefill_rows=16, prefill_chunk=64),
        warm_up=Stage(steps=400, questions=16, update=warm_up),
        main=Stage(questions=16, group_size=4, evaluate_every=20, update=main),
    )  # fmt: skip


def shrink(experiment: Experiment) -> None:
    """Every size as small as the loop allows."""
    experiment.name = "multihop:smoke"
    experiment.steps = 2
