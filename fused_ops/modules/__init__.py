"""Drop-in modules: subclasses of torch.nn's, with the activation in the constructor and the residual in forward."""

from .group_norm import AddGroupNorm as AddGroupNorm
from .group_norm import GroupNorm as GroupNorm
from .instance_norm import AddInstanceNorm1d as AddInstanceNorm1d
from .instance_norm import AddInstanceNorm2d as AddInstanceNorm2d
from .instance_norm import AddInstanceNorm3d as AddInstanceNorm3d
from .instance_norm import InstanceNorm1d as InstanceNorm1d
from .instance_norm import InstanceNorm2d as InstanceNorm2d
from .instance_norm import InstanceNorm3d as InstanceNorm3d
from .layer_norm import AddLayerNorm as AddLayerNorm
from .layer_norm import LayerNorm as LayerNorm
from .rms_norm import AddRMSNorm as AddRMSNorm
from .rms_norm import RMSNorm as RMSNorm
from .weight_standardization import WSConv1d as WSConv1d
from .weight_standardization import WSConv2d as WSConv2d
from .weight_standardization import WSConv3d as WSConv3d
