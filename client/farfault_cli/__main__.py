"""``python -m farfault_cli``: the command `farfault` of the same interpreter."""

from farfault_cli.main import main

main()
