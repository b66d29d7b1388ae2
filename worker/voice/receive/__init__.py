"""Receiving: what others in the channel say, as Opus frames or as sound, one user apart from the other.

    datagram -> transport (open) -> replay window -> SSRC to user -> end-to-end decryption -> jitter buffer -> streams

`pipeline` with its parts is pure: bytes and times in, frames out. `receiver` is the shell with timer, queues and log.
Source: voice protocol reference, sections 3.3, 4.2 to 4.5 and 5.
"""
