"""Handles the text of a sample: its messages, and the tokens that represent pictures."""
