"""Which parts of a conversion are finished, as recorded on disk. Resuming and verifying rely on it."""
