"""The same core, driven by a virtual clock instead of an engine."""
