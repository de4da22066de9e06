"""Normalization fused with the residual add and the activation beside it: Triton kernels, torch.nn interfaces.

``from fused_ops import LayerNorm, functional as F``; see `functional` for the formulas and `set_backend` for what runs.
"""

from . import functional as functional
from . import reference as reference
from .activation import Activation as Activation
from .backend import get_backend as get_backend
from .backend import set_backend as set_backend
from .backend import use_backend as use_backend
from .modules import AddGroupNorm as AddGroupNorm
from .modules import AddInstanceNorm1d as AddInstanceNorm1d
from .modules import AddInstanceNorm2d as AddInstanceNorm2d
from .modules import AddInstanceNorm3d as AddInstanceNorm3d
from .modules import AddLayerNorm as AddLayerNorm
from .modules import AddRMSNorm as AddRMSNorm
from .modules import GroupNorm as GroupNorm
from .modules import InstanceNorm1d as InstanceNorm1d
from .modules import InstanceNorm2d as InstanceNorm2d
from .modules import InstanceNorm3d as InstanceNorm3d
from .modules import LayerNorm as LayerNorm
from .modules import RMSNorm as RMSNorm
from .modules import WSConv1d as WSConv1d
from .modules import WSConv2d as WSConv2d
from .modules import WSConv3d as WSConv3d

__version__ = "0.1.0"
