"""Stand-ins for the modules of Megatron-Bridge that this project touches.

Megatron-Bridge does not install on a machine without CUDA: it needs Transformer Engine. These have
the shape of its modules (names, constructor, who imports what from whom) and nothing of its code;
around them everything is real megatron-core. Tests of the real ``Step37Model`` run where Bridge is
installed.
"""
