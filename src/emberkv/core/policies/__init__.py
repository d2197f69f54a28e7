"""Which entry gives up its place: the eviction policies, and what bounds them."""
