from .sampling import sample as sample
from .top_h import TopHLogitsProcessor as TopHLogitsProcessor
from .top_h import ecmm_bruteforce as ecmm_bruteforce
from .top_h import top_h_mask as top_h_mask
