"""Attention and linear layers on CPU in C++, compiled once on the machine that runs them.

A row's bits do not depend on which rows are computed with it, by construction.
"""
