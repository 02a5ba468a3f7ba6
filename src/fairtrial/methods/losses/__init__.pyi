from .ldr import ALDRLoss as ALDRLoss
from .ldr import CSLoss as CSLoss
from .ldr import LDRLoss as LDRLoss
from .ldr import WWLoss as WWLoss
from .z_loss import FactoredSphericalOutput as FactoredSphericalOutput
from .z_loss import SphericalSoftmaxLoss as SphericalSoftmaxLoss
from .z_loss import TaylorSoftmaxLoss as TaylorSoftmaxLoss
from .z_loss import ZLoss as ZLoss
