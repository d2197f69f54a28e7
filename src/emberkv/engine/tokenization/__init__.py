"""Text to token ids and back, chat templates, and what prompts have in common."""
