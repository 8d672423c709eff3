"""int8cli: LLM.int8() checkpoints, by streaming."""

__version__ = "0.1.0"
