"""The specification: every function on NumPy arrays in float64, forward and backward, with NumPy alone.

It shares no code with what it judges, and is itself judged by finite differences and by torch
(tests/test_reference.py).
"""

from .activations import ACTIVATIONS as ACTIVATIONS
from .activations import activation_slope as activation_slope
from .activations import activation_value as activation_value
from .row_norms import add_layer_norm as add_layer_norm
from .row_norms import add_layer_norm_backward as add_layer_norm_backward
from .row_norms import add_rms_norm as add_rms_norm
from .row_norms import add_rms_norm_backward as add_rms_norm_backward
from .row_norms import layer_norm as layer_norm
from .row_norms import layer_norm_backward as layer_norm_backward
from .row_norms import rms_norm as rms_norm
from .row_norms import rms_norm_backward as rms_norm_backward
from .row_norms import rms_norm_eps as rms_norm_eps
