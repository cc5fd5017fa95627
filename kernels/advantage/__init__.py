"""Credit over tokens: the segmented linear recurrence behind returns and GAE, and group statistics of rewards."""

from kernels.advantage.api import gae, linear_recurrence, returns
from kernels.advantage.group import group_leave_one_out, group_zscore

__all__ = ["gae", "group_leave_one_out", "group_zscore", "linear_recurrence", "returns"]
