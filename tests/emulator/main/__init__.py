"""The local Discord's REST interface and main gateway: bots log in, join voice channels and are told what happens."""
