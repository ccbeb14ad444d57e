"""The size of an image before it is cut."""

_LARGEST = 4096  # pixels of the longer side, whatever the settings say, as in transformers


def resized_shape(height: int, width: int, longest: int) -> tuple[int, int]:
    """(height, width) with the longer side `longest`; rounding as in transformers."""
    aspect, long = width / height, longest
    short = int(long / aspect) if width >= height else int(long * aspect)
    short += short % 2
    height, width = (short, long) if width >= height else (long, short)
    if long > _LARGEST:
        aspect, long = width / height, _LARGEST
        height, width = (int(long / aspect), long) if width >= height else (long, int(long * aspect))
    return max(height, 1), max(width, 1)
