"""The routes below /v1/cache, for the operator and for tenants who ask about their own prompts."""
