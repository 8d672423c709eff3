"""Every target by its name: what int8cli reads that others may have written."""

from torture.fuzzing.checkpoint_targets import CHECKPOINT_TARGETS
from torture.fuzzing.hub_target import HUB_TARGETS
from torture.fuzzing.model_targets import MODEL_TARGETS
from torture.fuzzing.output_targets import OUTPUT_TARGETS

TARGETS = {target.name: target for target in (*CHECKPOINT_TARGETS, *HUB_TARGETS, *OUTPUT_TARGETS, *MODEL_TARGETS)}
