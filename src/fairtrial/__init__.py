"""Give every method a fair trial: methods of machine-learning papers, and the bench that compares them honestly."""

__version__ = "0.1.0"
