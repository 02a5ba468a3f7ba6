"""The library: one file per paper, in family folders. Nothing of the bench is needed to use it."""
