"""What several test modules use: the program in child processes, checkpoints, a Hub, a browser."""
