from .adamp import SGDP as SGDP
from .adamp import AdamP as AdamP
from .frugal import FRUGAL as FRUGAL
from .frugal import frugal_param_groups as frugal_param_groups
from .tract import TrActConv2d as TrActConv2d
from .tract import TrActLinear as TrActLinear
from .tract import tract as tract
from .tract import tract_first_layer as tract_first_layer
