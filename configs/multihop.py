"""A search agent on real questions and real passages: a small model from scratch, warm-up on traces, then GRPO.

    python -m launch.train --config=configs/multihop.py --workdir=runs/multihop

Questions of HotpotQA, 2WikiMultiHopQA and MuSiQue, BM25 over their pooled passages; or, in the variant dense, vectors:

    make minilm
    python -m launch.build_index --corpus=../shared/data/corpus/passages.jsonl.gz --kind=flat --encoder=minilm \
        --out=runs/minilm
    python -m launch.train --config=configs/multihop.py:dense --workdir=runs/multihop_dense

The variant published begins from a folder in Hugging Face's form. `make published` makes a small one with random
weights and trains it: a short warm-up, then GRPO of all its parameters, and of adapters on what the warm-up gave.

The paths are those of the data beside the repository, seen from its root: give others by
--config.data.train=FILE?..., --config.retriever.corpus=FILE and so on. The test part is the published dev split, which
chooses nothing: validation is cut from train.
"""

from rlrag.config import Agent, Data, Experiment, Model, Retriever, Reward, Rollout, Stage, Tokenizer, Update

VARIANTS = ("bm25", "dense", "published", "smoke")
DENSE = "runs/minilm"  # an index that launch.build_index made
PUBLISHED = "runs/tiny_qwen"  # a model that tests.tiny_checkpoint made, of Qwen2.5's architecture

QUESTIONS = "../shared/data/corpus/questions.jsonl.gz"
CORPUS = "../shared/data/corpus/passages.jsonl.gz"
SETS = "dataset=hotpotqa,2wikimultihopqa,musique"


def get_config(variant: str = "bm25") -> Experiment:
    """bm25: the whole loop on two CPU cores. dense: the same over vectors of MiniLM, searched by a server of its own.
    published: the first, shorter, from a folder in Hugging Face's form, with its tokenizer and template. smoke: the
    first in seconds, for tests; it learns nothing."""
    if variant not in VARIANTS:
        raise ValueError(f"configs/multihop.py has no variant {variant!r}; there are: {', '.join(VARIANTS)}")
    experiment = bm25()
    if variant == "dense":
        experiment.name = "multihop:dense"
        experiment.retriever.kind, experiment.retriever.index = "index", DENSE
        experiment.retriever.spawn = True
    if variant == "published":
        publish(experiment)
    if variant == "smoke":
        shrink(experiment)
    return experiment


def bm25() -> Experiment:
    warm_up = Update(
        learning_rate=3e-3, schedule="cosine", final_fraction=0.05, warm_up_steps=40, weight_decay=0.01,
        row_tokens=512, micro_rows=2, max_micro=4,
    )  # fmt: skip
    main = Update(learning_rate=2e-4, warm_up_steps=5, row_tokens=512, micro_rows=4, max_micro=16)
    return Experiment(
        name="multihop:bm25",
        steps=60,
        checkpoint_every=50,
        model=Model(vocab_size=4096, num_layers=3, embed_dim=192, num_heads=4, num_kv_heads=4, head_dim=48,
                           mlp_dim=384, embed_scale=192**0.5, scan_unroll=3),
        data=Data(
            train=f"{QUESTIONS}?split=train&{SETS}&seed=0&skip=64",
            validation=f"{QUESTIONS}?split=train&{SETS}&seed=0&n=64",
            test=f"{QUESTIONS}?split=dev&{SETS}&seed=0&n=300",
        ),
        tokenizer=Tokenizer(train_vocab_size=4096),
        retriever=Retriever(kind="bm25", corpus=CORPUS, passage_words=12),
        agent=Agent(
            k=3, max_turns=4, max_searches=3, max_tokens_per_turn=64, max_tokens=512, max_answer_tokens=24,
            max_observation_tokens=128, instruction="Question: {question}\n",
        ),
        reward=Reward(metric="f1"),
        rollout=Rollout(num_slots=64, max_episodes=128, page_size=16, burst=8, prefill_rows=16, prefill_chunk=64),
        warm_up=Stage(steps=1500, questions=16, update=warm_up),
        main=Stage(questions=16, group_size=4, evaluate_every=20, update=main),
    )  # fmt: skip


def publish(experiment: Experiment) -> None:
    """Shape, parameters, tokenizer and template are those of a folder; fewer steps, to see the whole way."""
    experiment.name, experiment.steps = "multihop:published", 30
    experiment.model = Model(path=PUBLISHED, scan_unroll=3)
    experiment.tokenizer.chat_template = True
    experiment.warm_up.steps, experiment.main.evaluate_every = 500, 10


def shrink(experiment: Experiment) -> None:
    """Every size as small as the loop allows."""
    experiment.name, experiment.steps, experiment.checkpoint_every = "multihop:smoke", 2, 1
    experiment.model = Model(vocab_size=512, num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8,
                                    mlp_dim=32)  # fmt: skip
    experiment.tokenizer.train_vocab_size = 512
    data = experiment.data
    data.train, data.validation, data.test = (
        f"{QUESTIONS}?split={split}&{SETS}&seed=0&{part}"
        for split, part in (("train", "skip=4"), ("train", "n=4"), ("dev", "n=8"))
    )
    for field, value in (("num_slots", 8), ("max_episodes", 16), ("prefill_rows", 4)):
        setattr(experiment.rollout, field, value)
    warm_up, main = experiment.warm_up, experiment.main
    warm_up.steps, warm_up.questions = 3, 4
    main.questions, main.group_size, main.evaluate_every = 2, 2, 2
    warm_up.update.micro_rows = main.update.micro_rows = 2
