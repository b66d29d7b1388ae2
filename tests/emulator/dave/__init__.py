"""The delivery service of DAVE: what the gateway does for an MLS group, without an MLS library. Pure.

Source: reference sections 6.4 (byte layouts) and 6.9 (duties of the gateway).
"""
