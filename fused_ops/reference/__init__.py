"""The specification: every function on NumPy arrays in float64, forward and backward, with NumPy alone.

It shares no code with what it judges, and is itself judged by finite differences and by torch
(tests/test_reference*.py).
"""

from .activations import ACTIVATIONS as ACTIVATIONS
from .activations import activation_slope as activation_slope
from .activations import activation_value as activation_value
from .batch_norms import add_batch_norm as add_batch_norm
from .batch_norms import add_batch_norm_backward as add_batch_norm_backward
from .batch_norms import batch_norm as batch_norm
from .batch_norms import batch_norm_backward as batch_norm_backward
from .group_norms import add_group_norm as add_group_norm
from .group_norms import add_group_norm_backward as add_group_norm_backward
from .group_norms import group_norm as group_norm
from .group_norms import group_norm_backward as group_norm_backward
from .instance_norms import add_instance_norm as add_instance_norm
from .instance_norms import add_instance_norm_backward as add_instance_norm_backward
from .instance_norms import instance_norm as instance_norm
from .instance_norms import instance_norm_backward as instance_norm_backward
from .residual import residual_add as residual_add
from .residual import residual_add_backward as residual_add_backward
from .row_norms import add_layer_norm as add_layer_norm
from .row_norms import add_layer_norm_backward as add_layer_norm_backward
from .row_norms import add_rms_norm as add_rms_norm
from .row_norms import add_rms_norm_backward as add_rms_norm_backward
from .row_norms import layer_norm as layer_norm
from .row_norms import layer_norm_backward as layer_norm_backward
from .row_norms import rms_norm as rms_norm
from .row_norms import rms_norm_backward as rms_norm_backward
from .row_norms import rms_norm_eps as rms_norm_eps
from .switch_norms import add_switch_norm as add_switch_norm
from .switch_norms import add_switch_norm_backward as add_switch_norm_backward
from .switch_norms import switch_norm as switch_norm
from .switch_norms import switch_norm_backward as switch_norm_backward
from .weight_standardization import weight_standardize as weight_standardize
from .weight_standardization import weight_standardize_backward as weight_standardize_backward
