"""Answers while they are generated: from the engine's tokens to text."""
