"""Running what `convert` wrote: the transformers model, its linear layers computing LLM.int8() with stored columns.

`load.load_model` is what the package offers as `int8cli.load_model`; `stored` reads a converted directory, `linear` is
the layer.
"""
