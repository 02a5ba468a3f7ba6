"""One file per paper, mirroring `methods`: what its record claims, measured again.

A claims file has one function, `check(measure) -> list[Finding]`, with a finding for every claim that its record calls
testable. The criterion stands in the code before anything is measured; a claim that is not borne out is recorded so.
"""
