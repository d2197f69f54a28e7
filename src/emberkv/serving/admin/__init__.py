"""What people ask of the cache and tell it: the routes under /v1/cache and the books behind them."""
