"""Drop-in slimmable modules: subclasses of the torch modules with the same constructors and state_dict keys."""

from slimkernels.nn.attention import AnySizeMultiheadAttention, SlimMultiheadAttention
from slimkernels.nn.batch_norm import SlimBatchNorm1d, SlimBatchNorm2d, SlimBatchNorm3d
from slimkernels.nn.conv import (
    SlimConv1d,
    SlimConv2d,
    SlimConv3d,
    SlimConvTranspose1d,
    SlimConvTranspose2d,
    SlimConvTranspose3d,
)
from slimkernels.nn.embedding import SlimEmbedding
from slimkernels.nn.linear import SlimLinear
from slimkernels.nn.norm import (
    SlimGroupNorm,
    SlimInstanceNorm1d,
    SlimInstanceNorm2d,
    SlimInstanceNorm3d,
    SlimLayerNorm,
    SlimRMSNorm,
)
from slimkernels.nn.recurrent import SlimGRU, SlimGRUCell, SlimLSTM, SlimLSTMCell
from slimkernels.nn.sync_batch_norm import SlimSyncBatchNorm

__all__ = [
    "AnySizeMultiheadAttention",
    "SlimBatchNorm1d",
    "SlimBatchNorm2d",
    "SlimBatchNorm3d",
    "SlimConv1d",
    "SlimConv2d",
    "SlimConv3d",
    "SlimConvTranspose1d",
    "SlimConvTranspose2d",
    "SlimConvTranspose3d",
    "SlimEmbedding",
    "SlimGRU",
    "SlimGRUCell",
    "SlimGroupNorm",
    "SlimInstanceNorm1d",
    "SlimInstanceNorm2d",
    "SlimInstanceNorm3d",
    "SlimLSTM",
    "SlimLSTMCell",
    "SlimLayerNorm",
    "SlimLinear",
    "SlimMultiheadAttention",
    "SlimRMSNorm",
    "SlimSyncBatchNorm",
]
