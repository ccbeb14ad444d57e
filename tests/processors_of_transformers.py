"""Processors of transformers whose video part needs what the tests do not install."""

import functools
from pathlib import Path
from typing import Any


def without_video(kind: Any) -> Any:
    """What makes a processor of this class without its `video_processor`."""

    class Processor(kind):
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)

    Processor.__name__ = kind.__name__
    return functools.partial(Processor, video_processor=None)


def save_without_video(processor: Any, folder: Any) -> None:
    """The files of such a processor as transformers 4 wrote them, each part apart."""
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    (Path(folder) / "chat_template.jinja").write_text(processor.chat_template)
