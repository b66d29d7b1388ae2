"""The local Discord: voice servers on loopback that stand in for Discord's in runs, tests and benchmarks.

It shares no protocol code with the product, so that one mistake cannot sit on both sides of the wire.
"""
