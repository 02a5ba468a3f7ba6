"""The bench: recipes tuned alike, run on paired fresh seeds, judged with honest statistics.

It knows nothing of any particular task or method; those are handed to it.
"""
