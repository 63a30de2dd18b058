"""Published schemas of Kubernetes and Kubeflow, for manifests as dicts. An unknown field is an error, too."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

# Published with Kubeflow Trainer, generated from the OpenAPI descriptions of Kubernetes, JobSet and Trainer.
MODELS = "kubeflow_trainer_api.models"
TRAINER = {
    ("trainer.kubeflow.org/v1alpha1", "TrainJob"): "TrainerV1alpha1TrainJob",
    ("trainer.kubeflow.org/v1alpha1", "TrainingRuntime"): "TrainerV1alpha1TrainingRuntime",
    ("batch/v1", "Job"): "IoK8sApiBatchV1Job",
    ("v1", "Service"): "IoK8sApiCoreV1Service",
    ("v1", "PodTemplateSpec"): "IoK8sApiCoreV1PodTemplateSpec",
}
PLAIN = {"str": str, "int": int, "bool": bool}
PYTORCHJOB = json.loads((Path(__file__).parent / "schemas" / "pytorchjob-v1.json").read_text())["models"]
# What `kubectl explain` says of fields that the models above leave open.
CHOICES = {"restartPolicy": {"Always", "OnFailure", "Never", "ExitCode"}, "cleanPodPolicy": {"All", "Running", "None"}}


def validate(document: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: it is not what its apiVersion and kind say.
    """
    if document["kind"] == "PyTorchJob":
        assert document["apiVersion"] == "kubeflow.org/v1"
        validate_pytorchjob("V1PyTorchJob", document)
    else:
        validate_model(TRAINER[document["apiVersion"], document["kind"]], document)


def validate_model(name: str, document: dict[str, Any]) -> None:
    pytest.importorskip("kubeflow_trainer_api", reason="pip install '.[dev]' brings kubeflow-trainer-api")
    model = getattr(importlib.import_module(MODELS), name)
    read = model.from_dict(document)
    # They leave out what they do not know.
    lost = difference(document, read.to_dict())
    if lost:
        raise ValueError(f"{name} has no {', '.join(lost)}")


def difference(given: Any, read: Any, where: str = "") -> list[str]:
    """Paths of fields of `given` that are not in `read`, or not the same."""
    if isinstance(given, dict) and isinstance(read, dict):
        return [
            path
            for key, value in given.items()
            for path in (difference(value, read[key], f"{where}.{key}") if key in read else [f"{where}.{key}"])
        ]
    if isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        return [
            path for i, pair in enumerate(zip(given, read, strict=True)) for path in difference(*pair, f"{where}[{i}]")
        ]
    return [] if given == read else [where]


def validate_pytorchjob(model: str, value: dict[str, Any]) -> None:
    for name, content in value.items():
        if name not in PYTORCHJOB[model]:
            raise ValueError(f"{model} has no field {name}")
        validate_field(PYTORCHJOB[model][name], name, content)


def validate_field(kind: str, name: str, content: Any) -> None:
    mapping = re.fullmatch(r"dict\(str, (\w+)\)", kind)
    if mapping is not None:
        for each in content.values():
            validate_field(mapping[1], name, each)
    elif kind in PLAIN:
        if type(content) is not PLAIN[kind] or content not in CHOICES.get(name, {content}):
            raise ValueError(f"{name} is {content!r}, not a {kind} of {CHOICES.get(name, 'any value')}")
    elif kind in PYTORCHJOB:
        validate_pytorchjob(kind, content)
    elif kind == "V1PodTemplateSpec":
        validate_model(TRAINER["v1", "PodTemplateSpec"], content)
    else:
        assert kind == "V1ObjectMeta", kind
        validate_model("IoK8sApimachineryPkgApisMetaV1ObjectMeta", content)
