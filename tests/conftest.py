"""Eight fake CPU devices, so that sharding is tested everywhere; and the option to leave torch out."""

import os
import re
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

_NEEDS_REFERENCE = re.compile(
    r"^\s*(import|from) (torch|transformers|build|tiny_checkpoints|checkpoint_models|processing_checkpoint)\b",
    re.MULTILINE,
)


def pytest_addoption(parser):
    """`--core`: leave out the files that compare with the reference implementation (torch, transformers)."""
    parser.addoption("--core", action="store_true", help="leave out the files that need torch or transformers")


def pytest_ignore_collect(collection_path: Path, config):
    """See `pytest_addoption`."""
    if config.getoption("--core") and collection_path.suffix == ".py":
        return True if _NEEDS_REFERENCE.search(collection_path.read_text(encoding="utf-8")) else None
    return None
