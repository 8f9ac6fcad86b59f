"""Depth as data: plans, the recipes that make them, and what a plan does to a params tree.

Only `apply` and `freeze` need jax, and yaml is imported where a file is read or written: so a command
shows or refuses a plan at once.
"""
