"""Everything that is decided before a weight is read. Needs no torch."""
