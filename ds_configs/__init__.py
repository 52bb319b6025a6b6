"""Recipes (*.yaml), DeepSpeed JSON files and clusters/: found by name, also in a wheel (pangu.config.recipes)."""
