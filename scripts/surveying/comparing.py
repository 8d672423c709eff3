"""Where the plan differs from what transformers does with a model. survey_architectures.py explains the severities."""

from collections.abc import Iterator

from surveying.built_model import LOST, BuiltModel

from int8cli.checkpoint.tensor import TensorSpec
from int8cli.loaders.transformers_versions import SkipRule, covers_by_name
from int8cli.planning.decisions import Plan, PlanOptions
from int8cli.planning.layouts.skip_modules import skip_modules
from int8cli.planning.plan import kind_of, make_plan


def plan_for(model: BuiltModel) -> Plan:
    specs = [TensorSpec(name, model.dtypes[name], shape) for name, shape in model.shapes.items()]
    return make_plan(specs, model.config, PlanOptions())


def differences(model: BuiltModel, plan: Plan) -> Iterator[tuple[str, str, str, str]]:
    """(severity, kind, what the loader makes of it, our reason) for each tensor on which plan and loader differ."""
    for decision in plan.decisions:
        fate = model.fate[decision.spec.name]
        if fate == LOST:
            yield "lost", decision.kind, fate, decision.reason
            continue
        module = model.targets[decision.spec.name].removesuffix(".weight")
        conv1d = module in model.conv1d
        if decision.quantize and decision.transpose != conv1d:
            yield "FATAL", decision.kind, "Conv1D" if conv1d else "nn.Linear", "transposed the wrong way"
        if decision.quantize and module in model.read:
            yield "READ", decision.kind, "the weight is read", decision.reason
        if decision.quantize and fate not in ("int8", "kept"):
            yield "FATAL", decision.kind, fate, decision.reason
        elif decision.quantize and fate == "kept":
            yield "refused", decision.kind, fate, decision.reason
        elif not decision.quantize and fate == "int8" and decision.spec.numel and module not in model.read:
            yield "missed", decision.kind, fate, decision.reason


def skip_differences(model: BuiltModel, plan: Plan, rule: SkipRule) -> Iterator[tuple[str, str, str, str]]:
    """The same for `llm_int8_skip_modules`: would the loader then make int8 layers exactly where the file has int8?"""
    skips = skip_modules(plan)
    planned = {model.targets[d.spec.name].removesuffix(".weight") for d in plan.quantized}
    floats = {model.targets[d.spec.name].removesuffix(".weight") for d in plan.copied}
    if LOST in model.fate.values():  # which modules the others would fill is not known
        return
    for name in model.linears:
        converts = not any(rule(entry, name) for entry in skips)
        if converts and name not in planned:
            quantizes = rule is covers_by_name and name in floats
            severity = "loaded" if quantizes else "FATAL"
            yield severity, kind_of(name), "skip list", "llm_int8_skip_modules does not cover a linear left alone"
        elif not converts and name in planned:
            yield "FATAL", kind_of(name), "skip list", "llm_int8_skip_modules covers a linear that was quantized"


def dtype_differences(model: BuiltModel) -> Iterator[tuple[str, str, str, str]]:
    """The same for the floats: is what stays one written in the dtype in which the loader holds it?

    "narrow": the file has fewer bits than a load of the source would hold. "wide": more, and the same values.
    """
    for dtype, float32 in (("BF16", model.float32), ("F16", model.float32_in_float16)):
        named = {"BF16": "bfloat16", "F16": "float16"}[dtype]
        dtypes = {name: dtype if known == "BF16" else known for name, known in model.dtypes.items()}
        specs = [TensorSpec(name, dtypes[name], shape) for name, shape in model.shapes.items()]
        for decision in make_plan(specs, {**model.config, "dtype": named}, PlanOptions()).copied:
            if not decision.spec.name.endswith(".weight") or decision.spec.dtype != dtype:
                continue
            wanted = "F32" if model.targets[decision.spec.name] in float32 else dtype
            if decision.written_dtype != wanted:
                severity = "narrow" if wanted == "F32" else "wide"
                yield severity, decision.kind, f"{wanted} of {named}", f"written in {decision.written_dtype}"
