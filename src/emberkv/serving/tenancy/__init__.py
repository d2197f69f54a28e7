"""Tenants: their keys, salts and shares."""
