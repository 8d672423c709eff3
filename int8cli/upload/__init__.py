"""A conversion's way to the Hub: its shards as they are finished, then everything in one commit."""
