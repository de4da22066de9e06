"""Drop-in modules: subclasses of torch.nn's, with the activation in the constructor and the residual in forward."""

from .layer_norm import AddLayerNorm as AddLayerNorm
from .layer_norm import LayerNorm as LayerNorm
from .rms_norm import AddRMSNorm as AddRMSNorm
from .rms_norm import RMSNorm as RMSNorm
