"""What the Hub refuses of a model card's metadata, as far as the cards here could get it wrong."""

import re


def check_metadata(data):
    """What is wrong, in words; empty for metadata that the Hub takes."""
    wrong = []
    if not isinstance(data, dict):
        return ["metadata is no mapping"]
    for name in (data.get("base_model") or "a/b", *data.get("datasets", ["a/b"])):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name if "/" in str(name) else f"x/{name}"):
            wrong.append(f"{name} is no repository id")
    if data.get("base_model_relation", "adapter") not in ("adapter", "finetune", "quantized", "merge"):
        wrong.append("base_model_relation")
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not model["name"]:
            wrong.append("model-index needs a name")
        for result in model["results"]:
            if not result["task"].get("type") or not result["dataset"].get("type") or not result["dataset"].get("name"):
                wrong.append("a result needs task.type, dataset.type and dataset.name")
            for metric in result["metrics"]:
                if not metric.get("type") or not isinstance(metric.get("value"), int | float):
                    wrong.append("a metric needs type and value")
    return wrong
