"""Samples, shards, transforms and the epoch plan. Nothing heavy is imported here: packing needs no torch."""
