"""Depth as data: plans, the recipes that make them, and what a plan does to a params tree.

`plan` and `recipes` import neither jax nor yaml until they must, so that an entry point can show
or refuse a plan at once; only `apply` needs jax.
"""
