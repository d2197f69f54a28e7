"""Hit rate against cache size, without time: exact where one pass gives it, sampled elsewhere."""
