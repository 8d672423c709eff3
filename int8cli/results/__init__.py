"""The results of commands, as plain objects with JSON forms. Needs no torch."""
