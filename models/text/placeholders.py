"""What stands in a prompt for its images and videos."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlcache_jax.errors import InputError
from vlcache_jax.models.images.video import Video


class Placeholders:
    """The tokens that stand for one image, and for one video of a model that takes any.

    Attributes:
      by_kind: their texts, by "image" and "video".
      unread: the text that stands for a video, of a model whose videos are not read.
    """

    def __init__(self, image: str, video: str | None, unread: str | None = None) -> None:
        self.unread = unread
        self.by_kind: Mapping[str, str] = {"image": image} | ({} if video is None else {"video": video})
        self._pattern = re.compile("|".join(map(re.escape, self.by_kind.values())))

    def check(self, prompt: str, visuals: Sequence[Any], where: str) -> None:
        """Raises InputError, naming the prompt by `where`, unless it has a token for each of `visuals`, in order."""
        kinds = ["video" if isinstance(visual, Video) else "image" for visual in visuals]
        if "video" in kinds and "video" not in self.by_kind:
            raise InputError(
                f"{where}, image {kinds.index('video')} is a video, but this model takes none: give some of its frames "
                "as images"
            )
        if self.unread is not None and self.unread in prompt:
            raise InputError(
                f"{where}: the prompt holds {self.unread!r}, which stands for a video, but videos are not read of this "
                "model: give some of its frames as images"
            )
        found = self._pattern.findall(prompt)
        for kind, token in self.by_kind.items():
            if found.count(token) != kinds.count(kind):
                raise InputError(
                    f"{where}: the prompt holds {found.count(token)} {kind} tokens {token!r}, but {kinds.count(kind)} "
                    f"{kind}s were given: write the token once for each {kind}"
                )
        if found != [self.by_kind[kind] for kind in kinds]:
            raise InputError(
                f"{where}: images and videos are not in the order of their tokens in the prompt: sort them"
            )

    def replaced(self, prompt: str, pieces: Sequence[tuple[str, tuple[str, str]]]) -> str:
        """`prompt` with (text, around) in the place of each token; see `EncodedImage.around`."""
        texts = self._pattern.split(prompt)
        whole = texts[0]
        for (text, (before, behind)), following in zip(pieces, texts[1:], strict=True):
            if (before or behind) and whole.endswith(before) and following.startswith(behind):
                whole, following = whole.removesuffix(before), following.removeprefix(behind)
            whole += text + following
        return whole
