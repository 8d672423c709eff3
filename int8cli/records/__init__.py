"""What of a conversion is finished: what resuming and verifying trust."""
