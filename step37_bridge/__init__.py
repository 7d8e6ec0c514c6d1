"""Starts Megatron-Bridge's training of Step-3.7 with our embedding, data set and forward step.

``python -m step37_bridge`` runs Bridge's own script ``run_recipe.py``. ``python -m
step37_bridge.recipe`` runs our recipe, which needs no checkout of Bridge.
``step37_bridge.callbacks`` measures both embeddings in one job.
"""
