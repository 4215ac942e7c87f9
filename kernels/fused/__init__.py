"""Triton kernels and their launches: importing a module of this package loads triton, importing lynx.kernels not."""
