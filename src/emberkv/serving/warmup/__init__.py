"""What is computed before the first request, and kept warm after."""
