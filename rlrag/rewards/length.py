"""What too long an episode loses."""

from rlrag.rewards.paid import Paid, Reward
from rlrag.trajectory import Group, Trajectory


def overlong_reward(max_tokens: int, over: int) -> Reward:
    """A reward named "overlong": 0 up to max_tokens - over tokens, then falling linearly to -1 at max_tokens (soft
    overlong punishment, DAPO, Yu et al. 2025, arXiv 2503.14476, equation 13), paid to every stream alike.

    Tokens are those of an episode's longest stream, everything the limit counts: prompt, generations, passages.
    """
    if not 0 < over < max_tokens:
        raise ValueError(f"reward.overlong_tokens is {over}: give at least 1 and less than the longest, {max_tokens}")

    def pay(trajectory: Trajectory) -> Paid:
        longest = max((stream.num_tokens for stream in trajectory.streams), default=0)
        amount = -min(1.0, max(0.0, longest - (max_tokens - over)) / over)
        return Paid({"overlong": [amount] * len(trajectory.streams)}, metrics={"overlong": amount})

    def reward(group: Group) -> list[Paid]:
        return [pay(trajectory) for trajectory in group.trajectories]

    return reward
