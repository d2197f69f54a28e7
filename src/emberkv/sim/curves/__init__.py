"""Hit rate against cache size, without time: exact where one pass can tell, sampled where it cannot."""
