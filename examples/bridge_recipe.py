"""Fine-tune Step-3.7-Flash with Megatron-Bridge, the fused embedding and packed Flickr8k.

    torchrun --nproc-per-node=4 -m examples.bridge_recipe --smoke

The same as ``-m step37_bridge.recipe``, which an installed step37 has; ``--help`` lists its options
and the number of GPUs that it needs. ``step37_bridge/recipe.py`` shows the three places in which
this project's parts come into Bridge's recipe.
"""

from __future__ import annotations

from step37_bridge.recipe import main

if __name__ == "__main__":
    main()
