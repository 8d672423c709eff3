"""Threads and processes that run tasks, without knowing what the tasks do."""
