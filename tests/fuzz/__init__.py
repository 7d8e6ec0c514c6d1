"""Random inputs, good and bad, against oracles of their own: `make fuzz`.

Every case is made from (area, seed, number) alone, so that a finding can be had again.
"""
