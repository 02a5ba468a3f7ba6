from .xkv import XKVCache as XKVCache
from .xkv import cross_layer_svd as cross_layer_svd
from .xkv import group_layers as group_layers
from .xkv import minicache_merge as minicache_merge
from .xkv import reconstruct as reconstruct
from .xkv import slerp as slerp
from .xkv import subspace_overlap as subspace_overlap
from .xkv import xkv_bytes as xkv_bytes
