"""fuse(model): somebody else's model on these kernels, in one line, and back."""

from .fuse import fuse as fuse
from .fuse import unfuse as unfuse
from .report import fusion_report as fusion_report
