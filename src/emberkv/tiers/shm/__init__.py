"""The shared-memory tier: blocks in host memory that the processes of one machine share."""
