"""Version 1 of the wire contract: ``pages.proto`` (between hosts) and ``receiver.proto`` (on one host)."""
