"""Random groups of episodes as an engine returns them, without a model: what packing and the update are tested on."""

from collections.abc import Sequence

import numpy as np

from rlrag.packing import Packed, Shape, pack
from rlrag.rewards.paid import Paid
from rlrag.trajectory import COMPLETED, FORCED, OBSERVED, SAMPLED, Example, Group, Span, Stream, Trajectory

VOCAB_SIZE = 64
NUM_KEPT = 3
ROLES = {"talker": 0, "chooser": 1}
REWARDS = ("answer", "format")


def observed(role: str, tokens: Sequence[int]) -> Span:
    return Span(role, OBSERVED, np.asarray(tokens, np.int32))


def sampled(dice: np.random.Generator, role: str, count: int) -> Span:
    tokens = dice.integers(VOCAB_SIZE, size=count).astype(np.int32)
    kept = None
    if dice.random() < 0.4:  # a filtered call: the token and two others
        others = (tokens[:, None] + dice.integers(1, VOCAB_SIZE // 2, (count, 1)) * np.arange(1, NUM_KEPT)) % VOCAB_SIZE
        kept = np.concatenate([tokens[:, None], others], 1).astype(np.int32)
    numbers = [dice.random(count, np.float32) for _ in range(4)]
    tags = dice.integers(4, size=count).astype(np.int32)
    return Span(
        role, SAMPLED, tokens, -numbers[0], *numbers[1:], kept, tags, temperature=float(dice.choice([0.0, 0.7, 1.0]))
    )


def forced(dice: np.random.Generator, role: str, count: int) -> Span:
    return Span(role, FORCED, dice.integers(VOCAB_SIZE, size=count).astype(np.int32))


def make_stream(dice: np.random.Generator, name: str, role: str, prompt: Sequence[int], with_forced: bool) -> Stream:
    """A prompt, then calls with documents between them."""
    stream = Stream(name, role)
    stream.add(observed(role, prompt))
    for _ in range(dice.integers(1, 4)):
        stream.add(sampled(dice, role, int(dice.integers(1, 6))))
        if dice.random() < 0.7:
            stream.add(observed(role, dice.integers(VOCAB_SIZE, size=dice.integers(1, 9))))
    if with_forced:
        stream.add(observed(role, dice.integers(VOCAB_SIZE, size=2)))
        stream.add(forced(dice, role, 3))
    return stream


def make_groups(
    seed: int,
    num_questions: int = 3,
    group_size: int = 4,
    *,
    with_forced: bool = True,
    statuses: Sequence[str] = (COMPLETED,),
) -> list[Group]:
    """Groups that share a prompt of up to 30 tokens; some episodes have a second stream, with a prompt of its own."""
    dice = np.random.default_rng(seed)
    groups = []
    for question in range(num_questions):
        prompt = dice.integers(VOCAB_SIZE, size=dice.integers(2, 30))
        example = Example(f"q{question}", "", ("",))
        trajectories = []
        for sample in range(group_size):
            streams = [make_stream(dice, "main", "talker", prompt, with_forced)]
            if dice.random() < 0.4:
                streams.append(make_stream(dice, "choice", "chooser", prompt[: dice.integers(1, 20)], False))
            status = str(dice.choice(list(statuses)))
            trajectories.append(Trajectory(example, sample, streams, status=status, policy_version=question))
        groups.append(Group(example, trajectories))
    return groups


def pay(groups: Sequence[Group], seed: int = 0) -> list[list[Paid]]:
    """An answer reward for every call, a format reward for the first call only."""
    dice = np.random.default_rng(seed)

    def one(trajectory: Trajectory) -> Paid:
        answer, calls = float(dice.integers(2)), len(trajectory.streams)
        amounts = {"answer": [answer] * calls, "format": [float(dice.random())] + [float("nan")] * (calls - 1)}
        return Paid(amounts)

    return [[one(trajectory) for trajectory in group.trajectories] for group in groups]


def pack_groups(groups: Sequence[Group], paid: Sequence[Sequence[Paid]] | None = None, **changes) -> Packed:
    sizes = {"rows": 4, "tokens": 96, "max_segments": 12, "max_micro": 16, "num_kept": NUM_KEPT, "num_rewards": 2}
    return pack(groups, pay(groups) if paid is None else paid, ROLES, REWARDS, Shape(**sizes | changes))
