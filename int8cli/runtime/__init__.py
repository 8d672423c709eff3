"""Running a converted model: the transformers model, whose linear layers compute LLM.int8() with stored columns.

`load.load_model` is exported as `int8cli.load_model`, `stored` reads a converted directory, and `linear` is the layer.
"""
