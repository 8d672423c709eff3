"""The LLM.int8() arithmetic (Dettmers et al. 2022, arXiv:2208.07339). Takes and returns tensors."""
