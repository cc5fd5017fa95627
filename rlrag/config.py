"""An experiment as typed, mutable dataclasses: what a file in configs/ returns and flags override.

Every field is one line with its unit. The resolved tree is saved as JSON beside the checkpoint.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from rlrag.model.architecture import Architecture


@dataclass(unsafe_hash=True)
class Model(Architecture):
    """The policy: a shape of one's own, or a published model, whose shape and parameters are then taken."""

    MAIN: ClassVar[str] = "path"

    # A Hugging Face folder, what launch.convert wrote, or a hub id (owner/name). Its config.json then decides every
    # field above but dtype, param_dtype, remat, scan_unroll, value_head, base and adapters.
    path: str = ""


@dataclass
class Mesh:
    """Sizes of the device mesh."""

    data: int = -1  # -1: every device that `model` leaves
    model: int = 1
    replica: int = 1  # slices that hold the same parameters; only gradients travel between them


@dataclass
class Data:
    """Where questions come from: a file in a known format, `tfds:NAME?split=...&dir=...`, or `world:NAME?...`.

    validation and test empty: cut from train (rlrag/data/own.py). --config.data=FILE is --config.data.train=FILE.
    """

    MAIN: ClassVar[str] = "train"

    train: str = "world:multihop?split=train&seed=0&n=1000000"
    validation: str = "world:multihop?split=validation&seed=0&n=256"
    test: str = "world:multihop?split=test&seed=0&n=512"
    format: str = ""  # name of a published format; empty: recognised from the content


@dataclass
class Tokenizer:
    """Where token ids come from."""

    # A tokenizer.json or a Hugging Face folder; empty: that of model.path, the world's own, or trained on the corpus.
    path: str = ""
    chat_template: bool = False  # questions and passages are messages in the chat template of the tokenizer's folder
    train_vocab_size: int = 4096  # of a byte-level BPE trained on the corpus, where one is
    cache: str = ""  # directory that keeps a trained tokenizer; empty: the run's own


@dataclass
class Retriever:
    """What answers searches."""

    # "world": each question's own passages; "bm25": a corpus; "index": what launch.build_index made; "milvus": a
    # collection; "none": nothing is searched
    kind: str = "world"
    corpus: str = ""  # JSONL of {id, contents} or {id, title, text}, .gz allowed
    index: str = ""  # directory; several joined by commas are fused by reciprocal rank; of milvus: URI/COLLECTION
    encoder: str = ""  # Hugging Face directory, `minilm`, module:function; empty: the one that the index names
    rerank: str = ""  # module:function(query, passages) -> scores, or `encoder`
    depth: int = 100  # passages that fusing and reranking begin with
    url: str = ""  # http://host:port of a retrieval server that searches instead; several joined by commas
    spawn: bool = False  # start a server of what is described here, search through it, and stop it at the end
    spawn_flags: str = ""  # further flags of launch.serve_retrieval, as --workers=2
    dialect: str = "search_r1"  # how servers are spoken to: rlrag/retrieval/wire.py
    attempt_s: float = 10.0  # of the deadline, for one request to a server
    ready_s: float = 120.0  # how long a server may take to be ready at the start
    passage_words: int = 0  # first words of a passage that a search returns; 0: all. All of it is searched
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
class Optimizer:
    """AdamW behind a clip of the gradient's global norm."""

    learning_rate: float = 1e-3
    schedule: str = "constant"  # constant | cosine | linear, after warm-up
    final_fraction: float = 0.0  # of the learning rate, where the schedule ends
    warm_up_steps: int = 10
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0
    clip_norm: float = 1.0  # of the global gradient


@dataclass
class Update(Optimizer):
    """One stage's optimisation: the policy's optimizer, and how a batch is cut."""

    row_tokens: int = 128  # T of a packed row
    micro_rows: int = 32  # R of a micro-batch
    max_micro: int = 8  # micro-batches the batch arrays hold; they grow (one compile more) when that is too few
    max_segments: int = 16  # per row
    epochs: int = 1  # passes over a batch
    minibatches: int = 1  # optimizer steps a pass
    trains: str = ""  # paths of the parameters that learn, as "embed,layers.query"; empty: all, or the adapters alone


@dataclass
class Credit:
    """How rewards become a weight for every trained token (rlrag/objectives/credit.py has the equations)."""

    kind: str = "group"  # group: z-score | leave_one_out | returns | gae | rejection
    divide: bool = True  # group: by the group's standard deviation (Dr. GRPO: no)
    gamma: float = 1.0  # returns, gae: discount an action token
    lam: float = 1.0  # gae: lambda
    whiten: bool = True  # returns, gae: over all trained tokens of the batch
    baseline: bool = False  # returns: less the mean reward of the group
    threshold: float = 1.0  # rejection: least reward of an episode that is learned from
    kl_reward: float = 0.0  # coefficient of a KL penalty within the reward


@dataclass
class Loss:
    """What the main stage minimises (rlrag/objectives/losses.py has the equations)."""

    ratio: Literal["token", "sequence"] = "token"  # what the probability ratio is of (GSPO: sequence)
    # What the mean is over: tokens (DAPO), sequences (GRPO), sequences by a constant length (Dr. GRPO).
    aggregate: Literal["token", "sequence", "constant"] = "token"
    constant_tokens: int = 0  # constant: tokens a sequence counts for; 0: the longest an episode can be
    clip_low: float = 0.2  # of the ratio, below 1
    clip_high: float = 0.2  # above 1
    dual_clip: float = 0.0  # bound of the ratio where the advantage is negative, above 1; 0: none
    kl: float = 0.0  # coefficient of the KL to the stage's reference, as a loss
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"  # of the loss and of the reward
    kl_target: float = 0.0  # nats a token that the KL coefficient adapts to; 0: fixed
    kl_horizon: int = 10_000  # episodes over which it adapts
    reference: Literal["start", "base"] = "start"  # of the KL. start: the stage's first policy; base: adapters off
    entropy: float = 0.0  # coefficient of an entropy bonus
    old_logp: str = "sampler"  # of the ratio. "sampler": as recorded; "recompute": scored again by the learner
    importance: Literal["none", "token", "sequence"] = "none"  # truncated weights from the sampler to old_logp
    importance_cap: float = 2.0
    critic: str = ""  # trunk: a value head on the policy | separate: a model of its own; gae needs one
    value: float = 0.5  # coefficient of the value loss, where the head is on the trunk
    value_clip: float = 0.2  # how far a value may move from its old one before its gradient stops; 0: not clipped


@dataclass
class Stage:
    """One stage: how long, how many questions a step."""

    steps: int = 0  # of the warm-up; the main stage's are `Experiment.steps`
    questions: int = 32  # a step
    group_size: int = 1  # samples a question
    until_metric: str = ""  # stop early when this validation metric ...
    until_value: float = 0.0  # ... reaches this
    evaluate_every: int = 0  # steps; 0: only at the ends
    dynamic_sampling: int = 0  # rollouts a step at most, to fill it with groups whose rewards differ (DAPO); 0: off
    one_step_off: bool = False  # play the next batch while this one is learned from: it is one policy version old
    update: Update = field(default_factory=Update)
    credit: Credit = field(default_factory=Credit)
    loss: Loss = field(default_factory=Loss)
    critic: Optimizer = field(default_factory=Optimizer)  # of a separate critic


@dataclass
class Reward:
    """What an episode is paid. --config.reward=module:function is --config.reward.function=module:function."""

    MAIN: ClassVar[str] = "function"
    function: str = ""  # your own: module:function or file.py:function (rlrag/rewards/own.py); it replaces the metric
    # em | f1 | contains | search_r1 (Search-R1's rule of answer and format) | gsm8k ("#### N") | number (the last one)
    metric: str = "em"
    format: float = 0.0  # added for a well-formed episode
    overlong: float = 0.0  # taken at most from an episode that comes near the longest allowed (DAPO)
    overlong_tokens: int = 16  # over which that grows


@dataclass
class Watch:
    """When to raise an alarm: a bound that a metric crosses for `patience` steps in a row; 0: never. Alarms are told,
    written to the metrics and to alarms.jsonl; training goes on."""

    patience: int = 3  # steps
    max_gap: float = 0.05  # nats: mean |sampler - learner| log-prob of a token
    max_ratio: float = 20.0  # highest probability ratio before clipping
    min_entropy: float = 0.0  # nats
    max_zero_variance: float = 0.95  # share of groups without a gradient
    min_legal: float = 0.5  # share of generations the protocol allows
    max_truncated: float = 0.5  # share of episodes cut by a limit
    max_grad_norm: float = 100.0  # before clipping
    max_reward_drop: float = 0.5  # share of the best reward, both averaged over steps, that is lost


@dataclass
class Experiment:
    """Everything a run is made of. `steps` are the updates of the main stage."""

    name: str = "experiment"
    seed: int = 0
    steps: int = 200
    recipe: str = "rlrag.recipes.search_grpo:build"  # module:function from (Experiment, Task) to stages
    workflow: str = ""  # your own: module:function from (Tokenizer, Agent) to a workflow; empty: what the data suggest
    wandb: str = ""  # project of Weights & Biases that metrics go to as well; empty: none
    warm_start: str = ""  # workdir of a run whose newest policy begins the main stage, in place of a warm-up
    checkpoint_every: int = 50  # steps; the end of a stage is saved too
    best_metric: str = "em"  # of validation: its best parameters are kept in DIR/best
    log_episodes: int = 16  # episodes a step kept for the page (launch.view), and ten times as many of the last test
    model: Model = field(default_factory=Model)
    mesh: Mesh = field(default_factory=Mesh)
    data: Data = field(default_factory=Data)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    retriever: Retriever = field(default_factory=Retriever)
    agent: Agent = field(default_factory=Agent)
    rollout: Rollout = field(default_factory=Rollout)
    reward: Reward = field(default_factory=Reward)
    watch: Watch = field(default_factory=Watch)
    warm_up: Stage = field(default_factory=Stage)
    main: Stage = field(default_factory=Stage)


# Numbers are at least 0, but these at least 1. Mesh.data may be -1.
AT_LEAST_1 = {
    Experiment: "checkpoint_every",
    Tokenizer: "train_vocab_size",
    Rollout: (
        "num_slots max_episodes page_size burst prefill_rows prefill_chunk prefill_chunks max_stop_states "
        "search_threads search_batch"
    ),
    Stage: "questions group_size",
    Update: "row_tokens micro_rows max_micro epochs minibatches",
    Loss: "kl_horizon importance_cap",
    Reward: "overlong_tokens",
    Watch: "patience",
    Mesh: "data model replica",
    Retriever: "depth",
}
AT_MOST_1 = {Sampling: "top_p", Optimizer: "b1 b2 final_fraction", Credit: "gamma lam", Loss: "clip_low"}
ABOVE_0 = {Sampling: "top_p", Optimizer: "learning_rate clip_norm", Retriever: "deadline_s attempt_s ready_s"}
EVALUATED = ("em", "f1", "reward", "answered", "recall")
CHOICES = {
    Optimizer: {"schedule": ("constant", "cosine", "linear")},
    Credit: {"kind": ("group", "leave_one_out", "returns", "gae", "rejection")},
    Loss: {
        "ratio": ("token", "sequence"),
        "aggregate": ("token", "sequence", "constant"),
        "kl_estimator": ("k1", "k2", "k3"),
        "old_logp": ("sampler", "recompute"),
        "importance": ("none", "token", "sequence"),
        "reference": ("start", "base"),
        "critic": ("", "trunk", "separate"),
    },
    Retriever: {
        "kind": ("world", "bm25", "index", "milvus", "none"),
        "dialect": ("search_r1", "skyrl", "slime", "rerank", "web"),
    },
    Reward: {"metric": ("em", "f1", "contains", "search_r1", "gsm8k", "number")},
    Stage: {"until_metric": ("", *EVALUATED)},
    Experiment: {"best_metric": EVALUATED},
}


def check(experiment: Experiment) -> None:
    """Raise ValueError, naming the field, its value and the remedy, for what is wrong whatever the data and devices.

    It imports no JAX, so that a wrong value is told at once. What needs the data or the devices is checked where the
    run is set up (rlrag/setup.py).
    """
    if not isinstance(experiment, Experiment):
        raise ValueError(f"the configuration is a {type(experiment).__name__}: get_config must return an Experiment")
    check_part(experiment, "")
    try:
        experiment.model.check()
    except ValueError as error:
        raise ValueError(f"model.{error}") from None
    if experiment.main.steps:
        raise ValueError(
            f"main.steps is {experiment.main.steps}: leave it 0, the main stage has --config.steps={experiment.steps}"
        )
    for name, stage in (("warm_up", experiment.warm_up), ("main", experiment.main)):
        check_algorithm(stage, name)
        if stage.loss.reference == "base" and not experiment.model.adapters.rank:
            raise ValueError(
                f"{name}.loss.reference is 'base', the model without its adapters, and it has none: give "
                "--config.model.adapters.rank=16, or 'start'"
            )
        if stage.until_metric and not stage.evaluate_every:
            raise ValueError(
                f"{name}.until_metric is {stage.until_metric!r} but {name}.evaluate_every 0: give a number of steps"
            )
        if stage.update.max_segments < 2:
            raise ValueError(f"{name}.update.max_segments is {stage.update.max_segments}: give 2 or more")
    check_sampling(experiment.rollout)
    check_retriever(experiment.retriever)


def check_algorithm(stage: Stage, name: str) -> None:
    """What of a stage's algorithm must go together."""
    credit, loss = stage.credit, stage.loss
    if (credit.kind == "gae") != bool(loss.critic):
        raise ValueError(
            f"{name}.credit.kind is {credit.kind!r} and {name}.loss.critic {loss.critic!r}: gae needs a critic, "
            f"'trunk' or 'separate', and nothing else does"
        )
    if 0 < loss.dual_clip <= 1:
        raise ValueError(f"{name}.loss.dual_clip is {loss.dual_clip}: give more than 1, such as 3, or 0 for none")
    if loss.kl_target and not (loss.kl or credit.kl_reward):
        raise ValueError(f"{name}.loss.kl_target is {loss.kl_target}: give a loss.kl or credit.kl_reward to begin with")
    if loss.importance != "none" and loss.old_logp == "sampler":
        raise ValueError(
            f"{name}.loss.importance is {loss.importance!r}, weights from the sampler to old_logp, and old_logp is the "
            f"sampler's: give --config.{name}.loss.old_logp=recompute"
        )
    if credit.kind in ("group", "leave_one_out") and stage.dynamic_sampling and stage.group_size < 2:
        raise ValueError(f"{name}.dynamic_sampling is {stage.dynamic_sampling}, but groups have one member")


def check_part(part: Any, prefix: str) -> None:
    """Ranges and choices of every field of a part, and of the parts in it."""

    def listed(table: dict[type, str], name: str) -> bool:
        return any(name in table.get(cls, "").split() for cls in type(part).mro())

    for f in dataclasses.fields(part):
        name, value = prefix + f.name, getattr(part, f.name)
        choices = next((c for cls in type(part).mro() if (c := CHOICES.get(cls, {}).get(f.name))), None)
        if dataclasses.is_dataclass(value):
            check_part(value, f"{name}.")
        elif choices and value not in choices:
            raise ValueError(f"{name} is {value!r}: choose {' or '.join(map(repr, choices))}")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            if name == "mesh.data" and value == -1:
                continue
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value}: give a finite number")
            if listed(ABOVE_0, f.name) and value <= 0:
                raise ValueError(f"{name} is {value}: give more than 0")
            least = 1 if listed(AT_LEAST_1, f.name) else 0
            if value < least:
                raise ValueError(f"{name} is {value}: give at least {least}")
            if listed(AT_MOST_1, f.name) and value > 1:
                raise ValueError(f"{name} is {value}: give at most 1")


def check_retriever(r: Retriever) -> None:
    """What of a retriever must go together."""
    if r.url and r.spawn:
        raise ValueError(f"retriever.url is {r.url!r} and retriever.spawn true: give one of them")
    if r.kind == "none" and (r.url or r.spawn):
        raise ValueError(
            "retriever.kind is 'none', and a server is named: give --config.retriever.kind=bm25 or another"
        )
    if r.kind in ("index", "milvus") and not r.index:
        raise ValueError(f"retriever.kind is {r.kind!r}: say which with --config.retriever.index=DIR")


def check_sampling(rollout: Rollout) -> None:
    """Filtered sets need room, and a policy that learns must be able to choose."""
    for name in ("train", "evaluate"):
        sampling: Sampling = getattr(rollout, name)
        needed = sampling.top_k or int(sampling.top_p < 1)
        if needed > rollout.num_kept:
            wish = f"top_k {sampling.top_k}" if sampling.top_k else f"top_p {sampling.top_p}"
            raise ValueError(
                f"rollout.{name} has {wish}, but rollout.num_kept, the room for filtered sets, is {rollout.num_kept}: "
                f"give --config.rollout.num_kept={needed if sampling.top_k else 64} or more"
            )
    if rollout.train.temperature == 0:
        raise ValueError("rollout.train.temperature is 0: greedy episodes are all alike; give more than 0, such as 1.0")


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """Plain values; a function that stands in place of its name is written as module:function."""

    def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {k: f"{v.__module__}:{v.__qualname__}" if callable(v) else v for k, v in items}

    return dataclasses.asdict(experiment, dict_factory=plain)


def to_json(experiment: Experiment) -> str:
    return json.dumps(to_dict(experiment), indent=1)


def from_dict(values: dict[str, Any], cls: type = Experiment) -> Any:
    """The inverse of to_dict. ValueError names a field that does not exist, or a value of another kind than its."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    arguments = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{cls.__name__} has no field {name!r}; it has: {', '.join(known)}")
        field_ = known[name]
        default = field_.default if field_.default_factory is dataclasses.MISSING else field_.default_factory()
        if dataclasses.is_dataclass(default) and isinstance(value, dict):
            arguments[name] = from_dict(value, type(default))
        elif type(value) is type(default) or (isinstance(default, float) and type(value) is int):
            arguments[name] = value
        else:
            raise ValueError(f"{cls.__name__}.{name} is {value!r}: give a {type(default).__name__}")
    return cls(**arguments)
