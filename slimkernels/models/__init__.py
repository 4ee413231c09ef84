"""Plain networks whose widths can be chosen, for recipes, tests and benchmarks. They import torch only."""

from slimkernels.models.bsrnn import BSRNN
from slimkernels.models.convnext import ConvNeXt, convnext_tiny
from slimkernels.models.densenet import DenseNet, densenet121
from slimkernels.models.digits import DigitCNN
from slimkernels.models.inception import GoogLeNet, googlenet
from slimkernels.models.mobilenet import MobileNetV2, mobilenet_v2
from slimkernels.models.nsnet2 import NSNet2
from slimkernels.models.resnet import CifarResNet, ResNet, cifar_resnet20, cifar_resnet56, resnet18, resnet34, resnet50
from slimkernels.models.shufflenet import ShuffleNetV2, shufflenet_v2
from slimkernels.models.unet import UNet, unet
from slimkernels.models.vgg import VGG, vgg11, vgg16
from slimkernels.models.vit import VisionTransformer, vit_small
from slimkernels.models.wavenet import WaveNet, wavenet

__all__ = [
    "BSRNN",
    "VGG",
    "CifarResNet",
    "ConvNeXt",
    "DenseNet",
    "DigitCNN",
    "GoogLeNet",
    "MobileNetV2",
    "NSNet2",
    "ResNet",
    "ShuffleNetV2",
    "UNet",
    "VisionTransformer",
    "WaveNet",
    "cifar_resnet20",
    "cifar_resnet56",
    "convnext_tiny",
    "densenet121",
    "googlenet",
    "mobilenet_v2",
    "resnet18",
    "resnet34",
    "resnet50",
    "shufflenet_v2",
    "unet",
    "vgg11",
    "vgg16",
    "vit_small",
    "wavenet",
]
