"""A checkpoint on the Hugging Face Hub.

huggingface_hub is imported inside functions: importing it takes longer than `--help` may.
"""

from int8cli.checkpoint.hub.options import HubOptions
from int8cli.checkpoint.hub.retries import RetryPolicy
from int8cli.checkpoint.hub.source import HubSource

__all__ = ["HubOptions", "HubSource", "RetryPolicy"]
