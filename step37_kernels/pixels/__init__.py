"""From 8-bit pictures to the vision tower's input: normalise, resize as Pillow does, or both."""
