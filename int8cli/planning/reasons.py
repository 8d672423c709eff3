"""Why a tensor becomes int8, or does not: one short fragment each, fit for a table.

Owns the wording. `plan` gives the reasons; a report shows them, and nothing parses them.
"""

LINEAR = "linear layer"
NOT_FLOAT = "neither float32, float16 nor bfloat16"
NORM_OR_BIAS = "norm or bias"
NOT_A_MATRIX = "not a matrix"
NOT_A_WEIGHT = "a parameter that is no layer's weight"
EMPTY = "empty"
EMBEDDING = "embedding"
MAYBE_EMBEDDING = "embedding, by its name"  # a linear layer may go by it too
HEAD = "output head"
TIED_HEAD = "output head, tied with the embedding"
TIED = "tied with another layer"
LAST = "last layer, which transformers leaves alone"
OTHER_HEAD = "head that another program reads"
ROUTER = "MoE router"
EXPERT = "expert, fused by transformers"
FUSED = "split or merged by transformers on load"
FLOAT32 = "kept in float32 by transformers"  # in a float16 model
FLOAT32_ALWAYS = "always kept in float32 by transformers"  # in a bfloat16 model too
SUBCLASS = "a linear class of the model's own, which the bitsandbytes path does not replace"
READ = "multiplied by the model's own code, which needs a float weight"
MISREAD = "named so that transformers 5.0 would not load it in int8"
CONV1D = "a Conv1D, which this layout's loaders do not replace"
LOADER_FLOAT = "not supported in int8 by the loaders of this layout"
BESIDE_TEXT = "beside the language model; this layout's loaders want it in floats"
UNKNOWN = "not recognised as a linear layer"
SKIPPED = "left alone by --skip"
NOT_NAMED = "not named by --only"
NON_FINITE = "holds NaN or infinity"

# These are linear layers all the same.
LINEAR_LEFT_ALONE = frozenset(
    {
        *(
            TIED,
            OTHER_HEAD,
            ROUTER,
            EXPERT,
            FUSED,
            FLOAT32,
            FLOAT32_ALWAYS,
            SUBCLASS,
            READ,
            CONV1D,
            LOADER_FLOAT,
            BESIDE_TEXT,
            SKIPPED,
            NOT_NAMED,
        ),
        NON_FINITE,
    }
)
