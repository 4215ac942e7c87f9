"""Lynx on MoE layers that are written by hand in PyTorch."""
