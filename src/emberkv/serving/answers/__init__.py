"""From tokens to text: an answer while it is generated."""
