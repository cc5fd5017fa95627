"""An experiment as typed, mutable dataclasses: what a file in configs/ returns and flags override.

Every field is one line with its unit. The resolved tree is saved as JSON beside the checkpoint.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from rlrag.model.architecture import Architecture


@dataclass
class Mesh:
    """Sizes of the device mesh."""

    data: int = -1  # -1: every device that `model` leaves
    model: int = 1


@dataclass
class Data:
    """Where questions come from: a file in a known format, `tfds:NAME?split=...&dir=...`, or `world:NAME?...`."""

    train: str = "world:multihop?split=train&seed=0&n=1000000"
    validation: str = "world:multihop?split=validation&seed=0&n=256"
    test: str = "world:multihop?split=test&seed=0&n=512"
    format: str = ""  # name of a published format; empty: recognised from the content


@dataclass
class Tokenizer:
    """Where token ids come from."""

    path: str = ""  # a tokenizer.json or a Hugging Face directory; empty: the world's own, or trained on the corpus
    train_vocab_size: int = 4096  # of a byte-level BPE trained on the corpus, where one is
    cache: str = ""  # file that keeps a trained tokenizer; empty: beside the run


@dataclass
class Retriever:
    """What answers searches."""

    kind: str = "world"  # "world": each question's own passages; "bm25": a corpus
    corpus: str = ""  # JSONL of {id, contents} or {id, title, text}, .gz allowed
    cache_size: int = 65536  # queries remembered
    deadline_s: float = 30.0  # a slower search is answered by an error
    latency_s: float = 0.0  # injected, for measurements


@dataclass
class Agent:
    """The search agent's protocol. 0 or empty: what the world or the agent's default says."""

    k: int = 0  # passages a search
    max_turns: int = 0
    max_searches: int = 0
    max_tokens_per_turn: int = 0
    max_tokens: int = 0  # of the stream: prompt, answers and passages together
    max_answer_tokens: int = 0
    max_observation_tokens: int = 0
    on_limit: str = ""  # force_answer | free_answer | truncate
    on_invalid: str = ""  # correct | force_answer | end
    instruction: str = ""  # text with {question}


@dataclass
class Sampling:
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0


@dataclass
class Rollout:
    """Sizes of the sampling program; over all data shards together."""

    num_slots: int = 128  # decode lanes
    max_episodes: int = 512  # in flight at once, waiting ones included
    page_size: int = 8  # tokens
    num_pages: int = 0  # 0: enough for twice the slots
    burst: int = 8  # decode steps a round at most
    prefill_rows: int = 64
    prefill_chunk: int = 16  # tokens
    prefill_chunks: int = 8  # a round at most
    num_kept: int = 0  # capacity of filtered sets: >= top_k, allowed ids, and what top_p may keep
    max_stop_states: int = 64
    search_threads: int = 64
    search_batch: int = 64  # queries a retriever call
    train: Sampling = field(default_factory=Sampling)
    evaluate: Sampling = field(default_factory=lambda: Sampling(temperature=0.0))


@dataclass
class Update:
    """One stage's optimisation."""

    learning_rate: float = 1e-3
    schedule: str = "constant"  # constant | cosine | linear, after warm-up
    final_fraction: float = 0.0  # of the learning rate, where the schedule ends
    warm_up_steps: int = 10
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # of the global gradient
    row_tokens: int = 128  # T of a packed row
    micro_rows: int = 32  # R of a micro-batch
    max_micro: int = 8  # micro-batches the batch arrays hold; they grow (one compile more) when that is too few
    max_segments: int = 16  # per row
    epochs: int = 1  # passes over a batch
    minibatches: int = 1  # optimizer steps a pass
    clip_low: float = 0.2  # of the ratio, below 1
    clip_high: float = 0.2  # above 1
    kl: float = 0.0  # coefficient of k3 to the stage's reference
    old_logp: str = "sampler"  # "sampler": as recorded; "recompute": scored again by the learner


@dataclass
class Stage:
    """One stage: how long, how many questions a step."""

    steps: int = 0
    questions: int = 32  # a step
    group_size: int = 1  # samples a question
    until_metric: str = ""  # stop early when this validation metric ...
    until_value: float = 0.0  # ... reaches this
    evaluate_every: int = 0  # steps; 0: only at the ends
    update: Update = field(default_factory=Update)


@dataclass
class Reward:
    """What an episode is paid."""

    metric: str = "em"  # em | f1 | contains
    format: float = 0.0  # added for a well-formed episode


@dataclass
class Experiment:
    """Everything a run is made of. `steps` are the updates of the main stage."""

    name: str = "experiment"
    seed: int = 0
    steps: int = 200
    recipe: str = "rlrag.recipes.search_grpo:build"  # module:function from (Experiment, Parts) to stages
    checkpoint_every: int = 50  # steps of the main stage
    model: Architecture = field(default_factory=Architecture)
    mesh: Mesh = field(default_factory=Mesh)
    data: Data = field(default_factory=Data)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    retriever: Retriever = field(default_factory=Retriever)
    agent: Agent = field(default_factory=Agent)
    rollout: Rollout = field(default_factory=Rollout)
    reward: Reward = field(default_factory=Reward)
    warm_up: Stage = field(default_factory=Stage)
    main: Stage = field(default_factory=Stage)


def to_dict(experiment: Experiment) -> dict[str, Any]:
    return dataclasses.asdict(experiment)


def to_json(experiment: Experiment) -> str:
    return json.dumps(to_dict(experiment), indent=1)


def from_dict(values: dict[str, Any], cls: type = Experiment) -> Any:
    """The inverse of to_dict. ValueError names a field that does not exist, or has the wrong kind of value."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    arguments = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{cls.__name__} has no field {name!r}; it has: {', '.join(known)}")
        default = known[name].default_factory() if known[name].default_factory is not dataclasses.MISSING else None  # type: ignore[misc]
        arguments[name] = from_dict(value, type(default)) if dataclasses.is_dataclass(default) else value
    return cls(**arguments)
