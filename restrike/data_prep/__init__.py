"""Raw data sets to shards, verification of shards, and the small sets that ship with the library. Needs no torch."""
