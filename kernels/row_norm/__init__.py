"""Row family: statistics over one contiguous span. LayerNorm and RMSNorm are one kernel with a flag."""

from .backward import row_norm_backward as row_norm_backward
from .forward import row_norm_forward as row_norm_forward
