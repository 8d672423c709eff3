"""Threads and processes that run tasks and know none of them."""
