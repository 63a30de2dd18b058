"""Whether a run gets on: heartbeats, stalls, stops, its status, and where its time goes."""

from rae_scale.train.watch.clock import Phase
from rae_scale.train.watch.data import take
from rae_scale.train.watch.ranklog import RankLog
from rae_scale.train.watch.watch import StopAsked, Watch

__all__ = ["Phase", "RankLog", "StopAsked", "Watch", "take"]
