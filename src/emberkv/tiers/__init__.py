"""Where bytes live below the pool. Opaque bytes only: nothing here knows a tensor library."""
