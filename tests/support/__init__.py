"""What several test modules use: the program in processes of its own, checkpoints, a Hub, a browser."""
