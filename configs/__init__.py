"""Recipes: one Python file each; every one starts from default.py."""
