"""Residual and Transformer blocks: readable compositions of the package's modules, and the ResNets made of them.

Each takes its norm by name, see `norms`.
"""

from .residual import BasicBlock as BasicBlock
from .residual import Bottleneck as Bottleneck
from .residual import PreActivationBlock as PreActivationBlock
from .resnet import ResNet as ResNet
from .resnet import resnet18 as resnet18
from .resnet import resnet20 as resnet20
from .resnet import resnet56 as resnet56
from .resnet import resnet110 as resnet110
from .transformer import AddTransformerBlock as AddTransformerBlock
from .transformer import TransformerBlock as TransformerBlock
