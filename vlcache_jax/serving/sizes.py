"""Which sizes of prompts a server compiles for, before anybody has asked."""

from PIL import Image

from vlcache_jax.errors import InputError
from vlcache_jax.models.processor import Processor
from vlcache_jax.models.text.buckets import bucket_length


def usual_sizes(
    processor: Processor, most_positions: int, images: int, image_size: tuple[int, int], text_tokens: int
) -> list[tuple[int, int]]:
    """Buckets (tokens, tiles) for prompts without images, and with one, two, four, ... of them.

    Args:
      processor: of the checkpoint.
      most_positions: of the model.
      images: the most of a prompt.
      image_size: (width, height) of the pictures that count as usual; smaller ones take no more.
      text_tokens: room beside them.

    Raises:
      InputError: not even one such image fits into the model's positions.
    """
    picture = Image.new("RGB", image_size)
    counts = sorted({0, images, *(1 << i for i in range(images.bit_length()))})
    sizes: list[tuple[int, int]] = []
    for count in counts:
        parts = [*({"type": "image", "image": picture} for _ in range(count)), {"type": "text", "text": "a"}]
        batch = processor.chat([[{"role": "user", "content": parts}]])
        needed = int(batch.lengths[0])
        if needed >= most_positions:
            if count <= 1:
                raise InputError(
                    f"a picture of {image_size[0]} x {image_size[1]} pixels is {needed} tokens, and the model has "
                    f"{most_positions} positions: give a smaller --image-size"
                )
            break
        sizes.append((min(most_positions, bucket_length(needed + text_tokens)), batch.pixels.shape[1]))
    return sizes
