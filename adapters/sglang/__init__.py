"""The SGLang adapter, written to SGLang's own plugin hooks. Not run on an engine yet: read and unit-tested only.

SGLang is imported inside functions, and only where SGLang itself has loaded this package.
"""
