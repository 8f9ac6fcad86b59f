"""A plan carried out on files, out of core; `python -m jaxup.build` is its entry point."""
