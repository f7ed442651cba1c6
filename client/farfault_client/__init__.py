"""The destination side of Farfault: page client, fault engine, receive daemon, migrate."""
