"""Workers that speak only the OpenAI API: requests are forwarded to them, and what they have cached is inferred."""
