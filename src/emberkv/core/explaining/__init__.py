"""Why a prompt's tokens were not found: what became of every block."""
