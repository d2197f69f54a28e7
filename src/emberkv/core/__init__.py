"""The pure decisions: which blocks match, which to allocate, which to evict, what to compute next.

No I/O, no threads, no clock, no tensors: the server and the simulator drive the same objects.
"""
