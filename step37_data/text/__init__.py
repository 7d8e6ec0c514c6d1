"""The text of a sample: its messages, and the tokens that stand for pictures in it."""
