"""The functions: torch.nn.functional's norms, with the residual add and the activation beside them in one call."""

from .batch_norms import add_batch_norm as add_batch_norm
from .batch_norms import batch_norm as batch_norm
from .channel_norms import add_group_norm as add_group_norm
from .channel_norms import add_instance_norm as add_instance_norm
from .channel_norms import group_norm as group_norm
from .channel_norms import instance_norm as instance_norm
from .residual_adds import residual_add as residual_add
from .row_norms import add_layer_norm as add_layer_norm
from .row_norms import add_rms_norm as add_rms_norm
from .row_norms import layer_norm as layer_norm
from .row_norms import rms_norm as rms_norm
from .switch_norms import add_switch_norm as add_switch_norm
from .switch_norms import switch_norm as switch_norm
from .weight_standardization import weight_standardize as weight_standardize
