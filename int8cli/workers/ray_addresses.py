"""The words that stand for the address of a Ray cluster. Needs nothing."""

AUTO = "auto"  # the one that runs on this machine, or that of RAY_ADDRESS
LOCAL = "local"  # a new one on this machine
HERE = "here"  # as AUTO, if there is one, else as LOCAL
