"""The KV pool, and attention over it by torch's own operations."""
