"""Simulation: the scheduler, the prefix cache and the routers that serve, driven by a virtual clock."""
