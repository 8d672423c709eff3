"""What this machine is, and how fast: its cores, its memory, and rates that were measured on it. Knows no model."""
