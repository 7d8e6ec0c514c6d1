"""Fine-tunes Step-3.7-Flash with Megatron-Bridge, the fused embedding and packed Flickr8k.

    torchrun --nproc-per-node=4 -m examples.bridge_recipe --smoke

It does the same as ``-m step37_bridge.recipe`` of an installed step37; ``--help`` lists its options
and the number of GPUs that it needs. In ``step37_bridge/recipe.py`` the three places are marked at
which this project's parts are put into Bridge's recipe.
"""

from __future__ import annotations

from step37_bridge.recipe import main

if __name__ == "__main__":
    main()
