"""How lmms-eval finds the model: the entry point of the group `lmms_eval.models`."""

from typing import Any


def manifest() -> Any:
    """The `ModelManifest`, whose classes are imported when they are asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = f"{__package__}.model"
    return ModelManifest(
        model_id="vlcache_jax", simple_class_path=f"{module}.SimpleModel", chat_class_path=f"{module}.ChatModel"
    )
