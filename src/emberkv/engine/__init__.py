"""The engine: the contract with executors, the loop that drives one, and what goes in and comes out. No torch here.

`torch` holds the executor of PyTorch, `tokenization` the way from text to token ids and back.
"""
