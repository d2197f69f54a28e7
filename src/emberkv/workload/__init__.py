"""Where requests come from: recorded traces and generated conversations, as one stream of requests."""
