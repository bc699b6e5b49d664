"""Channel groups: what must shrink together when a program loses channels, heads or neurons."""

from sqcompile.channels.cost import Costs, count_macs
from sqcompile.channels.groups import Group, Groups, Member, find_groups

__all__ = ["Costs", "Group", "Groups", "Member", "count_macs", "find_groups"]
