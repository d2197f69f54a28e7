"""Models: their files, what identifies them, their shape, and whether they can be served."""
