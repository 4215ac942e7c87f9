"""The command line: ``lynx demo``, ``lynx strategies``, ``lynx inspect``, ``lynx doctor``."""

from lynx.cli.app import app, main

__all__ = ["app", "main"]
