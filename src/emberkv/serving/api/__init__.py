"""The OpenAI and Anthropic APIs: their routes, the schemas of requests, and the wire forms of answers."""
