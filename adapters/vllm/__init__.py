"""The vLLM adapter: routers that vLLM's own factory made, with a selection behind them.

vLLM is imported inside functions, and only where vLLM itself has loaded this package.
"""
