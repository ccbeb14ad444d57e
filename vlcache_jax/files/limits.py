"""The most that a file from others may ask for, checked before anything is sized by it.

Every limit is far above what published models have and far below what hurts. `docs/checkpoints.md` shows them.
"""

from typing import NamedTuple


class Range(NamedTuple):
    """Numbers from `least` to `most`, both included."""

    least: float
    most: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.least <= value <= self.most

    def __str__(self) -> str:
        return f"from {self.least:.10g} to {self.most:.10g}"


# JSON
JSON_BYTES = 4 * 2**20  # of a file
TABLE_BYTES = 32 * 2**20  # of an index, or of the header of a safetensors file; the format itself allows 100 MB
JSON_DEPTH = 32  # objects and lists within one another
JSON_DIGITS = 40  # of a whole number; transformers writes 10^30 for "no maximum"
TEXT_BYTES = 256 * 2**20  # of tokenizer.json, chat templates and other texts

# Tensors
TENSOR_NAME = 500  # characters
TENSOR_AXES = 8
TENSOR_SIDE = 2**40

# Sizes of a model
LAYERS = Range(1, 1024)
HEADS = Range(1, 1024)
HEAD_SIZE = Range(2, 4096)
CHANNELS = Range(1, 2**20)  # hidden and intermediate sizes
ADAPTER_RANK = Range(1, 8192)
ADAPTER_SCALE = Range(1e-6, 1e6)  # alpha of an adapter
ADAPTER_DROPOUT = Range(0.0, 1.0)
VOCABULARY = Range(1, 2**23)
POSITIONS = Range(1, 2**27)
TOKEN_ID = Range(-1, 2**31 - 1)  # some files mean "no such token" by -1
TOKEN_IDS = 256  # ids that end an answer
FEATURE_LAYERS = 64  # vision layers whose outputs are joined

# Images
IMAGE_SIDE = Range(1, 16384)  # pixels
PATCHES_A_SIDE = 256  # of a tile
PINPOINTS = 256  # resolutions that an image may be cut to
TILES = 256  # of an image

# Numbers of formulas
EPSILON = Range(1e-20, 1.0)
ROPE_THETA = Range(1.001, 1e15)  # YaRN divides by its logarithm
ROPE_FACTOR = Range(1e-3, 1e6)
ROPE_TURNS = Range(1e-6, 1e6)  # beta_fast, beta_slow, low_freq_factor, high_freq_factor
ROPE_SCALE = Range(1e-6, 1e6)  # attention_factor, mscale, mscale_all_dim
PIXEL_SCALE = Range(-1e6, 1e6)  # rescale_factor, image_mean, image_std

# Chat templates, which are programs
TEMPLATE_CHARACTERS = 1_000_000
TEMPLATE_SECONDS = 1  # of processor time for one prompt; common templates take a thousandth of it
TEMPLATE_WALL_SECONDS = 10  # by the clock, for busy machines and those without limits of processor time
TEMPLATE_MEGABYTES = 512  # beyond what the interpreter takes
PROMPT_CHARACTERS = 2_000_000  # some 450,000 tokens of English
TEMPLATE_ADDS = 100_000  # characters, beside ten times the conversation
TEMPLATES = 100  # of a checkpoint

# Tokenizers
TOKENIZER_GROWTH = 1000  # how many times longer the steps around the model may make a text
TOKENIZER_STEPS = 1000
CHARACTERS_A_TOKEN = 64  # on average over a prompt; English has four or five

# Images inside messages
DATA_URL_CHARACTERS = 2**27  # more than any picture within the limit of pixels takes as PNG or JPEG
