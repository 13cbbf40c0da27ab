"""The command line: Hydra composes a recipe, jsonargparse validates it, Lightning runs it."""
