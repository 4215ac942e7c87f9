"""``python -m lynx``."""

from lynx.cli import main

main()
