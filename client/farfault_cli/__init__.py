"""The one command ``farfault``: finding subcommands, and the manners that they share."""

__version__ = "0.1.0"
