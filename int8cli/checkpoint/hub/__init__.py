"""A checkpoint on the Hugging Face Hub.

huggingface_hub is imported where it is used: it takes longer to import than `--help` may last.
"""

from int8cli.checkpoint.hub.options import HubOptions
from int8cli.checkpoint.hub.retries import RetryPolicy
from int8cli.checkpoint.hub.source import HubSource

__all__ = ["HubOptions", "HubSource", "RetryPolicy"]
