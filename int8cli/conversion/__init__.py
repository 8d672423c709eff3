"""One shard, then all of them, and the files that describe a finished conversion."""

# The module that the server of worker processes imports before it forks them; see workers.processes.
WORKER_PRELOAD = "int8cli.conversion.preload"
