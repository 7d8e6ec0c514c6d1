"""Starts Megatron-Bridge's training of Step-3.7 with the parts of step37 in place.

``python -m step37_bridge`` runs Bridge's own ``run_recipe.py``, ``python -m step37_bridge.recipe``
a recipe that needs no checkout of Bridge; ``step37_bridge.callbacks`` compares with stock.
"""
