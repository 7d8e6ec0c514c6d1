"""Turns 8-bit pictures into the vision tower's input: normalises, and resizes as Pillow does."""
