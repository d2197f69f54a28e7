"""What a request looks like and what an answer looks like, for either API."""
