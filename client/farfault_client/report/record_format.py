"""The record of a move: one JSON object a line.

=========  ===========================================================================================
header     when recording began (``unix_s``), of whom, guest size
sample     ``t`` (seconds since the header), counters, and what has changed since the sample before: latencies
           by histogram bucket; every few samples ``map``, a digit a cell: 0 nothing settled .. 9 everything
event      ``t``, ``level`` (``info``, ``warning``, ``error``), ``text``
footer     ``t`` and ``summary``, the figures that `farfault receive --json` prints
=========  ===========================================================================================

A receiver that takes a move up appends: the file then holds a header for each. A new move begins the file anew.
"""

from typing import Final

VERSION: Final = 1
