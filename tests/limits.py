"""The one time limit of the tests.

It ends what hangs, and no test's verdict depends on how fast a machine is: a busy machine may take
many times as long as a quiet one.
"""

HANGS_AFTER_S = 600
