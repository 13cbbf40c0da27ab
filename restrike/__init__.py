"""Restrike: published vision models, trained again exactly as published."""

__version__ = "0.1.0"
