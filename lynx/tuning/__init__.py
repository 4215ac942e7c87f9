"""Choosing settings for a user's own model: measure layers one by one, share the loss out, verify on other text."""
