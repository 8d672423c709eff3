"""What commands found, as plain objects with JSON forms. Needs no torch."""
