"""Streaming parsers of model output, which separate reasoning, content and tool calls.

transformers' `ResponseParser` is not used: it emits a call only when its markup is closed, raises for a call with
invalid JSON, and needs a response template, which few models ship. These parsers do not depend on the server.
"""
