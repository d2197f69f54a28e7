"""HTTP below the APIs: connections, request bodies, the origin of requests, and what every request gets."""
