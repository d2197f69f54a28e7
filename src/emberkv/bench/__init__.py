"""The load client: multi-turn conversations against any OpenAI-compatible server, timed from outside."""
