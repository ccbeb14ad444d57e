"""What a picture shows of the images and videos of a prompt, and where on it visual tokens lie."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from vlcache_jax.models.families.family import ImageLayout, VideoLayout
from vlcache_jax.models.images.opening import load_image
from vlcache_jax.models.images.video import Video
from vlcache_jax.models.text.arguments import Visual

MOST_FRAMES = 24
"""Of a video, evenly spread; more would be too small to see anything."""


def shown(visuals: Sequence[Visual], layout: ImageLayout) -> tuple[list[Image.Image], list[np.ndarray]]:
    """The images, and of each video a strip of frames; and for each of these the regions of visual tokens.

    Args:
      visuals: images and videos of a prompt, in its order.
      layout: of the processor.

    Returns:
      Pictures in RGB, and for each of them f32 [visual tokens, 4] as of `ImageLayout.token_regions`. All of them
      together are the prompt's visual tokens in order: those of frames that are not shown have no place.
    """
    names = [f"image {number}" for number in range(len(visuals))]
    stills = [load_image(x, name) for x, name in zip(visuals, names) if not isinstance(x, Video)]
    of_stills = zip(stills, layout.token_regions([(image.height, image.width) for image in stills]))
    pictures: list[Image.Image] = []
    regions: list[np.ndarray] = []
    for visual, name in zip(visuals, names):
        if not isinstance(visual, Video):
            found = [next(of_stills)]
        elif isinstance(layout, VideoLayout):
            frames = visual.load(name)
            of_frames = layout.video_regions(len(frames), frames[0].height, frames[0].width)
            found = [(frames[number], boxes) for number, boxes in of_frames]
        else:
            found = []  # the number of visual tokens then tells that something is wrong
        drawn = set(np.linspace(0, len(found) - 1, min(len(found), MOST_FRAMES)).round().astype(int).tolist())
        for number, (picture, boxes) in enumerate(found):
            if number in drawn:
                pictures.append(picture)
                regions.append(boxes)
            else:
                regions[-1] = np.concatenate([regions[-1], np.full_like(boxes, np.nan)])
    return pictures, regions
