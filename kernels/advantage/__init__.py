"""Credit over tokens: the segmented linear recurrence behind returns and GAE, and group statistics of rewards."""

from kernels.advantage.api import gae, returns
from kernels.advantage.group import group_leave_one_out, group_moments, group_zscore
from kernels.advantage.terms import Advantages, Moments

__all__ = ["Advantages", "Moments", "gae", "group_leave_one_out", "group_moments", "group_zscore", "returns"]
