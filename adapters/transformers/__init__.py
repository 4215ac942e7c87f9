"""Lynx on models of Hugging Face transformers."""
