"""The disk tier: one file a block in a folder that several processes may share. `tier.DiskTier` is the way in."""
