"""Rewrites what changes from prompt to prompt without need, where the operator asks for it."""
