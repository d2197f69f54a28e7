"""The cache of the model that is served, seen from the event loop: what it holds and why it misses."""
