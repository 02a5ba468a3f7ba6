"""Smaller key-value caches: `transformers` caches with fewer channels, ranks, bits or tokens."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
