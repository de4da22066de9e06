"""Normalization fused with the residual add and the activation beside it: Triton kernels, torch.nn interfaces.

``from fused_ops import LayerNorm, functional as F``; see `functional` for the formulas and `set_backend` for what runs.
"""

from . import functional as functional
from . import reference as reference
from .activation import Activation as Activation
from .backend import get_backend as get_backend
from .backend import set_backend as set_backend
from .backend import use_backend as use_backend
from .modules import AddLayerNorm as AddLayerNorm
from .modules import AddRMSNorm as AddRMSNorm
from .modules import LayerNorm as LayerNorm
from .modules import RMSNorm as RMSNorm

__version__ = "0.1.0"
