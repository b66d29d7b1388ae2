"""Clients not written here against the local Discord: discord.py's own voice client, and @discordjs/voice."""
