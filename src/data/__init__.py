"""Data: captioned pictures, aspect-ratio buckets, caches on disk, and the torch data set made of them."""
