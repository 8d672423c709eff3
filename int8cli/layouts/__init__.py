"""Output layouts: the names, dtypes and config keys that each loader expects."""
