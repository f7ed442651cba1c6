"""The wire contract of Farfault. ``farfault.v1`` is generated from the ``.proto`` files beside it."""
