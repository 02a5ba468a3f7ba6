"""What a method can be tried on: the shipped tasks, and a person's own.

`load('digits')` gives a task to run. The rest is what tasks are made of: a file of one's own imports it from here.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
