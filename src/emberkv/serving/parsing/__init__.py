"""Incremental parsers of model output: text in as it is sampled, thoughts, content and tool calls out.

transformers' `ResponseParser` was considered: it streams text, but hands out a call only when its markup is closed,
raises where a call is no valid JSON, and needs a response template, which few models ship. So these parsers are our
own. They import nothing of the server.
"""
