"""Choosing the next token, or the direction of the text: samplers, drafts at the price of one, steering."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
