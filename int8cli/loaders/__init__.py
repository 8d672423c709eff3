"""What loaders do with a checkpoint, by version: observed facts. Reads no files."""
