"""Layers that the model families share; import them from their own files."""
