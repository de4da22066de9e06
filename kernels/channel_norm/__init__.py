"""Channel family: statistics over planes, each a channel of one sample. Group and instance norm, in both layouts."""

from .backward import group_norm_backward as group_norm_backward
from .forward import group_norm_forward as group_norm_forward
