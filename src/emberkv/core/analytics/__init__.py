"""Estimates from what a cache has seen: popular prefixes, hit rates of other sizes, how long work takes."""
