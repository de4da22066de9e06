"""Normalization fused with the residual add and the activation beside it: Triton kernels, torch.nn interfaces.

``from fused_ops import LayerNorm, functional as F``; see `functional` for the formulas and `set_backend` for what runs.
"""

from . import blocks as blocks
from . import functional as functional
from . import reference as reference
from .activation import Activation as Activation
from .backend import get_backend as get_backend
from .backend import set_backend as set_backend
from .backend import use_backend as use_backend
from .fusion import fuse as fuse
from .fusion import fusion_report as fusion_report
from .fusion import unfuse as unfuse
from .modules import AddBatchNorm1d as AddBatchNorm1d
from .modules import AddBatchNorm2d as AddBatchNorm2d
from .modules import AddBatchNorm3d as AddBatchNorm3d
from .modules import AddGroupNorm as AddGroupNorm
from .modules import AddInstanceNorm1d as AddInstanceNorm1d
from .modules import AddInstanceNorm2d as AddInstanceNorm2d
from .modules import AddInstanceNorm3d as AddInstanceNorm3d
from .modules import AddLayerNorm as AddLayerNorm
from .modules import AddRMSNorm as AddRMSNorm
from .modules import AddSwitchNorm1d as AddSwitchNorm1d
from .modules import AddSwitchNorm2d as AddSwitchNorm2d
from .modules import AddSwitchNorm3d as AddSwitchNorm3d
from .modules import AddSyncBatchNorm as AddSyncBatchNorm
from .modules import BatchNorm1d as BatchNorm1d
from .modules import BatchNorm2d as BatchNorm2d
from .modules import BatchNorm3d as BatchNorm3d
from .modules import GroupNorm as GroupNorm
from .modules import InstanceNorm1d as InstanceNorm1d
from .modules import InstanceNorm2d as InstanceNorm2d
from .modules import InstanceNorm3d as InstanceNorm3d
from .modules import LayerNorm as LayerNorm
from .modules import ResidualAdd as ResidualAdd
from .modules import RMSNorm as RMSNorm
from .modules import SwitchNorm1d as SwitchNorm1d
from .modules import SwitchNorm2d as SwitchNorm2d
from .modules import SwitchNorm3d as SwitchNorm3d
from .modules import SyncBatchNorm as SyncBatchNorm
from .modules import WSConv1d as WSConv1d
from .modules import WSConv2d as WSConv2d
from .modules import WSConv3d as WSConv3d
from .modules import convert_sync_batchnorm as convert_sync_batchnorm

__version__ = "0.1.0"
