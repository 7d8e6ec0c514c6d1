"""Stand-ins for the two modules of Megatron-Bridge that ``patch_step37`` touches.

Megatron-Bridge does not install on a machine without CUDA: it needs Transformer Engine. These have
the shape of its modules (names, constructor, who imports what from whom) and nothing of its code;
around them everything is real megatron-core. Tests of the real ``Step37Model`` run where Bridge is
installed.
"""
