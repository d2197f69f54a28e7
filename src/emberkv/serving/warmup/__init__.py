"""Prompts that are computed before the first request, and kept warm afterwards."""
