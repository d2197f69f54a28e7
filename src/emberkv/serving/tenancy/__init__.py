"""Who asks: keys, tenants, their salts and shares."""
