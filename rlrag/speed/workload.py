"""Episodes of forced lengths: how much is played is known beforehand, whoever plays it, and so is the least work.

What an episode does follows from its example's id alone, so that two samplers can be given the same episodes, and a
floor can be calculated without playing.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rlrag.agents.workflow import Generate, Search
from rlrag.trajectory import COMPLETED, OBSERVED, SAMPLED, Example, Group, Outcome, Span, Stream, Trajectory

ROLE = "agent"
Range = tuple[int, int]  # least and most, both included


class Turn(NamedTuple):
    """What is read before a turn, and how many tokens are then sampled."""

    append: Sequence[int]
    length: int


@dataclass(frozen=True)
class Workload:
    """Sizes of episodes, drawn evenly between the least and the most; those of turns, where `skewed`, evenly in the
    logarithm: most are short and a few are long, as answers are."""

    vocab_size: int
    prompt_tokens: int
    turns: Range = (1, 1)
    turn_tokens: Range = (128, 128)
    document_tokens: Range = (0, 0)
    skewed: bool = False

    @property
    def capacity(self) -> int:
        """Tokens of the longest episode."""
        turns = self.turns[1]
        return self.prompt_tokens + turns * self.turn_tokens[1] + (turns - 1) * self.document_tokens[1]

    def episode(self, name: str, sample: int = 0) -> list[Turn]:
        """The turns of an episode; samples of one name share its prompt, and differ in all else."""
        dice = random.Random(name)
        read = self._tokens(dice, self.prompt_tokens)
        dice = random.Random(f"{name} {sample}")
        turns = []
        for _ in range(dice.randint(*self.turns)):
            turns.append(Turn(read, self._length(dice)))
            read = self._tokens(dice, dice.randint(*self.document_tokens))
        return turns

    def play(self, example: Example, mode: str):
        """A workflow of these episodes: a search for a document between two turns."""
        for number, turn in enumerate(self.episode(example.id)):
            if number:
                yield Search((f"{example.id} {number}",), 1)
            yield Generate(ROLE, ROLE, turn.append, (), turn.length)
        return Outcome(None)

    def examples(self, count: int, seed: int = 0) -> list[Example]:
        return [Example(f"{seed} {number}", "", ()) for number in range(count)]

    def groups(self, count: int, size: int, seed: int = 0) -> list[Group]:
        """Records of episodes that nobody played: tokens, log-probs and entropies are random."""
        made = []
        for example in self.examples(count, seed):
            trajectories = []
            for sample in range(size):
                stream = Stream(ROLE, ROLE)
                for span in self._spans(self.episode(example.id, sample), f"{example.id} {sample}"):
                    stream.add(span)
                trajectories.append(Trajectory(example, sample, [stream], status=COMPLETED))
            made.append(Group(example, trajectories))
        return made

    def _spans(self, turns: Sequence[Turn], name: str) -> Iterator[Span]:
        dice = np.random.default_rng(random.Random(name).randrange(2**32))
        for turn in turns:
            if len(turn.append):
                yield Span(ROLE, OBSERVED, np.asarray(turn.append, np.int32))
            tokens = dice.integers(1, self.vocab_size - 1, turn.length).astype(np.int32)
            # About what a uniform distribution over the vocabulary says.
            nats = np.full(turn.length, np.log(self.vocab_size), np.float32)
            yield Span(ROLE, SAMPLED, tokens, -nats, nats, np.zeros_like(nats), np.zeros_like(nats))

    def _tokens(self, dice: random.Random, count: int) -> list[int]:
        return [dice.randrange(1, self.vocab_size - 1) for _ in range(count)]

    def _length(self, dice: random.Random) -> int:
        least, most = self.turn_tokens
        if not self.skewed:
            return dice.randint(least, most)
        return min(most, int(least * ((most + 1) / least) ** dice.random()))


class Volume(NamedTuple):
    """What playing some episodes takes, whatever the sampler."""

    sampled: int  # tokens
    sampled_context: int  # summed over them: tokens seen by the one that each follows
    read: int  # tokens cached before a turn: all but the newest, which its first step reads
    read_context: int  # summed over them: tokens each sees, itself among them


def volume(episodes: Sequence[Sequence[Turn]]) -> Volume:
    sampled = sampled_context = read = read_context = 0
    for turns in episodes:
        length = 0
        for turn in turns:
            cached = max(length - 1, 0)
            length += len(turn.append)
            fresh = length - 1 - cached
            read += fresh
            read_context += fresh * cached + fresh * (fresh + 1) // 2
            sampled += turn.length
            sampled_context += turn.length * length + turn.length * (turn.length - 1) // 2
            length += turn.length
    return Volume(sampled, sampled_context, read, read_context)
