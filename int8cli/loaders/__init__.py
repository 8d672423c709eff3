"""What loaders do with a checkpoint, by their versions: facts that were seen, and nothing that reads a file."""
