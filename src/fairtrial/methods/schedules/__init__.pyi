from .wsd_s import WSDLR as WSDLR
from .wsd_s import WSDSLR as WSDSLR
from .wsd_s import CyclicCosineLR as CyclicCosineLR
from .wsd_s import river_valley_expected_loss as river_valley_expected_loss
