"""The recipes, a yaml file each, and the table of the systems they reproduce: `python -m engine.recipes [NAME ...]`."""
