"""int8cli: LLM.int8() checkpoints, by streaming."""
