"""Measuring what selection costs and what it buys, on a user's own model and text."""
