"""Images and text to a `Batch`, and tokens back to text."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlcache_jax.errors import CheckpointError, InputError
from vlcache_jax.files.limits import CHARACTERS_A_TOKEN
from vlcache_jax.inputs import Batch, Continuation
from vlcache_jax.models.assembling import PromptSize, assembled, tile_bucket
from vlcache_jax.models.families.family import BlendingLayout, EncodedImage, ImageLayout, VideoLayout, limited
from vlcache_jax.models.images.frame_sampling import FrameSampling
from vlcache_jax.models.images.opening import load_image
from vlcache_jax.models.images.video import Video
from vlcache_jax.models.io.files import Folder
from vlcache_jax.models.io.processor_reader import read_parts
from vlcache_jax.models.text.arguments import Visual, check_room, continuation_texts, image_rows, token_rows
from vlcache_jax.models.text.buckets import bucket_length, check_buckets
from vlcache_jax.models.text.chat import split_conversation
from vlcache_jax.models.text.chat_template import ChatTemplate
from vlcache_jax.models.text.placeholders import Placeholders
from vlcache_jax.models.text.rows import check_image_token, check_rows, check_vocabulary
from vlcache_jax.models.text.tokenizer import Tokenizer
from vlcache_jax.parallel.mesh import check_known


class Processor:
    """Turns images and prompts into what a model takes, of whatever family; its `layout` knows the images.

    Everything runs in numpy on the host. Token ids equal those of the family's processor of transformers; pixels equal
    those of its PIL-based image processor.

        processor = Processor.from_folder("llava-1.5-7b-hf")
        batch = processor(images=["cat.jpg"], text=["USER: <image>\\nWhat is this? ASSISTANT:"])
        texts = processor.decode(generate(model, params, batch, ...))

    Attributes:
      tokenizer: the wrapped tokenizer (`encode`, `decode`, `decode_stream`).
      layout: how images become pixels and visual tokens; of the model's family.
      image_token: the text that stands for one image in a prompt, such as "<image>".
      special_tokens: the named special tokens of the checkpoint; "image_token" is a visual token, of which an image
        becomes many.
      chat_templates: their sources by name; that of `chat` is "default".
    """

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        layout: ImageLayout,
        image_token: str = "<image>",
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        buckets: Sequence[int] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.layout = layout
        self.image_token = image_token
        self.special_tokens = {"image_token": image_token} | tokenizer.special_tokens | dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self._templates: dict[str, ChatTemplate] = {}
        self._buckets = None if buckets is None else check_buckets(buckets)
        check_image_token(tokenizer, self.visual_token, self.config.image_token_id)
        check_vocabulary(tokenizer, self.embedding_rows)
        unread = None
        if self.sampling is None:
            unread = self.special_tokens.get("video_token")
        else:
            self.special_tokens.setdefault("video_token", "<video>")  # which some tokenizers need not know
        self._placeholders = Placeholders(image_token, self.video_token, unread)
        video_id = None if self.video_token is None else tokenizer.token_to_id(self.video_token)
        self._visual_ids = [self.config.image_token_id] + ([] if video_id is None else [video_id])
        if self.has_chat_template:
            self._chat_template("default")  # which may not parse: better known now

    @classmethod
    def from_folder(
        cls, path: Folder, *, buckets: Sequence[int] | None = None, image_limits: Mapping[str, Any] | None = None
    ) -> "Processor":
        """Reads the processor of a checkpoint folder, in the forms that transformers 4 and 5 write.

        Needs `config.json`, `tokenizer.json`, and `preprocessor_config.json` or a `processor_config.json`
        that holds the image processor; reads `tokenizer_config.json`, `special_tokens_map.json` and the chat
        template where present.

        Args:
          path: a local folder.
          buckets: padded prompt lengths to choose from; by default multiples of 64 up to 512, of 256 up to
            4096, then of 1024.
          image_limits: how large images become, of a model that takes any size; and "pixel_prune", docs/pruning.md.
            `max_image_tokens`: visual tokens of an image; or the same as an area, `max_pixels`; `min_pixels`; or both
            as `size`, {"shortest_edge": least, "longest_edge": greatest}, areas whatever their names.

        Raises:
          CheckpointError: a file is missing or malformed, or the parts do not fit one another.
          InputError: limits that contradict each other, or of a model that has none.
        """
        parts = read_parts(path)
        if image_limits:
            parts["layout"] = limited(parts["layout"], image_limits)
        return cls(**parts, buckets=buckets)

    @property
    def config(self) -> Any:
        """The config of the model that the processor serves."""
        return self.layout.config

    @property
    def embedding_rows(self) -> int:
        """Rows of the model's embedding table: every token id of a prompt lies below. The weights are held to it."""
        return self.config.decoder.vocab_size

    @property
    def padding_id(self) -> int:
        """The id that fills padded rows: it always has a row, which the tokenizer's padding token need not."""
        own = self.tokenizer.pad_token_id
        return own if own < self.embedding_rows else 0

    @property
    def visual_token(self) -> str:
        """The text of a visual token: mostly the same as `image_token`."""
        return self.special_tokens["image_token"]

    @property
    def video_token(self) -> str | None:
        """The text that stands for one video in a prompt; None of a model that takes no videos."""
        return None if self.sampling is None else self.special_tokens["video_token"]

    @property
    def sampling(self) -> FrameSampling | None:
        """Which frames of a video file the model is given: see `Video.from_file`. None: it takes no videos."""
        return self.layout.sampling if isinstance(self.layout, VideoLayout) else None

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` can be used without naming a template."""
        return "default" in self.chat_templates

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] = (),
        *,
        pad_to: int | None = None,
        pad_tiles_to: int | None = None,
    ) -> Batch:
        """A batch from prompts that hold one image token per image.

        Args:
          images: for each prompt a list of images, `[[a], [b, c], []]`; or, with one image per prompt, the
            flat list `[a, b]`. An image is a PIL image, an array (see `load_image`), a path or a data URL. None if
            no prompt has an image. Of a model that takes videos, `Video`s stand among them, in the order of the prompt,
            in which the video token stands for each.
          text: the prompts. A single str is a batch of one; its images may be given as `image` or `[image,
            image]`.
          pad_to: the padded length in tokens; by default the smallest bucket that holds the longest prompt.
          pad_tiles_to: the tiles of a row; by default the most that a row of this batch has. LLaVA-NeXT cuts images
            of different shapes into different numbers of tiles: fix it to compile once for all of them. Of models that
            take images of any size, the patches of a row; by default the smallest bucket (of prompts) that holds them.

        Returns:
          Batch with tokens i32 [batch, length], lengths i32 [batch], vision_index i32 [batch, length] and
          pixels f32 [batch, tiles, image_size, image_size, 3], or [batch, patches, channels of a patch] with cells i32
          [batch, patches, 4] (see `Batch`), all of them numpy arrays.

        Raises:
          InputError: prompts and images that do not match, an empty prompt, an image that cannot be used, or
            a prompt longer than `pad_to` or the largest bucket, or with more tiles than `pad_tiles_to`.
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not all(isinstance(prompt, str) for prompt in texts):
            raise InputError(f"text is {str(text)[:80]!r} of type {type(text).__name__}: give a str or a list of str")
        if not texts:
            raise InputError("text is empty: give at least one prompt")
        rows = image_rows(images, len(texts), single=isinstance(text, str))
        return self._batch(list(texts), rows, [True] * len(texts), pad_to, pad_tiles_to)

    def chat(
        self,
        conversations: Sequence[Any],
        *,
        images: Any = None,
        template: str = "default",
        add_generation_prompt: bool = True,
        pad_to: int | None = None,
        pad_tiles_to: int | None = None,
    ) -> Batch:
        """A batch from conversations, by one of the checkpoint's chat templates.

        A template is a program from the checkpoint. It runs in a sandbox and in a process of its own, which is started
        once (0.1 s) and takes about 0.3 ms for a conversation; `vlcache_jax/files/limits.py` has its limits.

        Args:
          conversations: a list of conversations, each a list of messages `{"role": ..., "content": ...}`
            whose content is a str or a list of `{"type": "text", "text": ...}` and `{"type": "image",
            "image": ...}` (or `"path"`); a single conversation is a batch of one. OpenAI's `{"type": "image_url",
            "image_url": {"url": "data:image/png;base64,..."}}` is taken, too; other URLs are not opened. Videos are
            `{"type": "video", "video": ...}` with a `Video`; a list of frames beside which "times" or "fps" stands; or
            the path of a file, from which frames are taken as `sampling` says, with "fps", "num_frames", "min_frames"
            and "max_frames" in its place. If the template expects the content in another form, it is converted.
          images: as in `__call__`, the images of the parts `{"type": "image"}` that hold none, in order; in a
            conversation without image parts, those of the image tokens in its texts.
          template: the name of a template (a key of `chat_templates`).
          add_generation_prompt: end with what starts the assistant's answer.
          pad_to, pad_tiles_to: as in `__call__`.

        Raises:
          InputError: a malformed message, one that the template refuses, an unknown template, images without a place or
            places without an image, or what `__call__` raises.
          CheckpointError: the checkpoint has no chat template, or one that fails or takes too much time or memory.

        Example:
          question = [{"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is this?"}]
          batch = processor.chat([{"role": "user", "content": question}])
        """
        texts, rows, add_special_tokens = self._rendered(conversations, images, template, add_generation_prompt)
        return self._batch(texts, rows, add_special_tokens, pad_to, pad_tiles_to)

    def _rendered(
        self, conversations: Any, images: Any, template: str, add_generation_prompt: bool
    ) -> tuple[list[str], list[list[Visual]], list[bool]]:
        """The prompts of conversations, their images and videos, and whether special tokens have to be added."""
        renderer = self._chat_template(template)
        if not isinstance(conversations, (list, tuple)) or not conversations:
            raise InputError("conversations is not a list of conversations: give [[{'role': 'user', 'content': ...}]]")
        single = not isinstance(conversations[0], (list, tuple))
        if single:
            conversations = [conversations]
        beside = image_rows(images, len(conversations), single)
        pairs = [
            split_conversation(item, f"row {row}", beside[row], self.sampling) for row, item in enumerate(conversations)
        ]
        texts = [renderer.render(messages, add_generation_prompt) for messages, _ in pairs]
        bos = self.tokenizer.bos_token
        # Many templates write the beginning-of-sequence token themselves; it must not come twice.
        return texts, [of_row for _, of_row in pairs], [not bos or not text.startswith(bos) for text in texts]

    def _chat_template(self, name: str) -> ChatTemplate:
        if not self.chat_templates:
            raise CheckpointError(
                "this checkpoint has no chat template: write the prompt yourself and call the processor "
                "with it, or put a chat_template.jinja in the folder"
            )
        if not isinstance(name, str) or name not in self.chat_templates:
            names = ", ".join(map(repr, self.chat_templates))
            raise InputError(f"there is no chat template {name!r}: choose one of {names} by template=")
        if name not in self._templates:
            special = self.tokenizer.special_tokens
            self._templates[name] = ChatTemplate(self.chat_templates[name], special, self._placeholders.by_kind)
        return self._templates[name]

    def continuation(
        self, text: str | Sequence[str] | Sequence[Sequence[str]], *, pad_to: int | None = None
    ) -> Continuation:
        """Text that goes on where prompts end, without a beginning-of-sequence token: see `vlcache_jax.extend`.

        The text is tokenised by itself. Begin it where tokens of the prompt end too, after a line break or a special
        token for instance; within a word its ids would not be those of the whole text.

        Args:
          text: one text for each row of a context, or a list of equally many for each row. A single str is one row.
          pad_to: the padded length in tokens; by default the smallest of 16, 32 and the buckets of prompts that holds
            the longest text.

        Returns:
          Continuation with tokens i32 [rows, length] or [rows, texts of a row, length].

        Raises:
          InputError: anything else, an empty text, one that holds the image token, or one longer than `pad_to`.
        """
        texts, lead = continuation_texts(text)
        tokens = []
        for number, item in enumerate(texts):
            tokens_of_images = (*self._placeholders.by_kind.values(), self.visual_token)
            held = next((token for token in tokens_of_images if token in item), None)
            if held is not None:
                raise InputError(f"text {number} holds {held!r}: images belong into the prompt")
            tokens.append(self.tokenizer.encode(item, add_special_tokens=False))
            if not tokens[-1]:
                raise InputError(f"text {number} is empty: {item!r} has no tokens")
            check_rows(tokens[-1], self.embedding_rows, self.tokenizer, f"text {number}")
        longest = max(map(len, tokens))
        short = next((size for size in (16, 32) if longest <= size), None)
        length = pad_to if pad_to is not None else short or bucket_length(longest, self._buckets)
        check_room("pad_to", length, longest, "tokens in the longest text")
        ids = np.full((len(tokens), int(length)), self.padding_id, np.int32)
        for row, of_text in enumerate(tokens):
            ids[row, : len(of_text)] = of_text
        lengths = np.asarray([len(of_text) for of_text in tokens], np.int32)
        return Continuation(ids.reshape(*lead, -1), lengths.reshape(lead))

    def measure(
        self, images: Any = None, text: str | Sequence[str] = (), *, conversations: Sequence[Any] | None = None
    ) -> list[PromptSize]:
        """How large prompts are, before any program runs: arguments as of a call; or conversations as of `chat`.

        A prefill program is compiled for each `bucket` (and batch size): one that differs from row to row tells to fix
        `pad_to` and `pad_tiles_to`, or to lower `image_limits`.

        Raises InputError as a call or `chat` does, which also raises CheckpointError.

        Example:
          sizes = processor.measure([["a.jpg"], ["b.jpg", "c.jpg"]], prompts)
          print(max(size.images for size in sizes), "programs:", {size.bucket for size in sizes})
        """
        if conversations is not None:
            prompts = zip(*self._rendered(conversations, images, "default", True))
        else:
            texts = [text] if isinstance(text, str) else list(text)
            rows = image_rows(images, len(texts), single=isinstance(text, str))
            prompts = zip(texts, rows, [True] * len(texts))
        read = [self._read([prompt], [row], [special]) for prompt, row, special in prompts]
        return [PromptSize.of(tokens[0], encoded[0], self._buckets) for encoded, tokens in read]

    def decode(self, out: Any) -> list[Any]:
        """The texts of generated tokens, special tokens left out.

        Args:
          out: an object with `tokens` [batch, steps] and `lengths` [batch], of which a row's first
            `lengths[row]` tokens count; or a whole [batch, steps] array; or a list of lists of token ids.
            Of answers to several questions, `tokens` [rows, questions, steps], the texts are in lists of lists.

        Raises InputError for anything else, or for a negative token id.
        """
        generated = hasattr(out, "tokens") and hasattr(out, "lengths")
        tokens = out.tokens if generated else out
        check_known(tokens, "the tokens")
        if generated and np.ndim(tokens) > 2:
            nested = zip(np.asarray(tokens), np.asarray(out.lengths), strict=True)
            return [self.decode(Continuation(of_row, lengths)) for of_row, lengths in nested]
        return [self.tokenizer.decode(row.tolist()) for row in token_rows(out)]

    def _batch(
        self,
        texts: list[str],
        images: list[list[Visual]],
        add_special_tokens: list[bool],
        pad_to: int | None,
        pad_tiles_to: int | None,
    ) -> Batch:
        encoded, tokens = self._read(texts, images, add_special_tokens)
        length = bucket_length(max(map(len, tokens)), self._buckets) if pad_to is None else pad_to
        check_room("pad_to", length, max(map(len, tokens)), "tokens in the longest prompt, its visual ones included")
        most = max(sum(len(image.pixels) for image in row) for row in encoded)
        check_room("pad_tiles_to", pad_tiles_to, most, "tiles in the row with most")
        tiles = tile_bucket(encoded, most) if pad_tiles_to is None else pad_tiles_to
        pixels = self.layout.normalised(encoded, int(tiles))
        blends = isinstance(self.layout, BlendingLayout) and self.layout.blends
        return assembled(tokens, encoded, pixels, int(length), self._visual_ids, self.padding_id, blends)

    def _read(
        self, texts: list[str], images: list[list[Visual]], add_special_tokens: list[bool]
    ) -> tuple[list[list[EncodedImage]], list[np.ndarray]]:
        """The images and the tokens of all prompts."""
        for row, (prompt, row_images) in enumerate(zip(texts, images, strict=True)):
            if not prompt.strip():
                raise InputError(f"row {row}: the prompt is empty")
            positions = self.config.decoder.extended_positions
            if len(prompt) > CHARACTERS_A_TOKEN * positions:  # tokenising it would take much memory for nothing
                raise InputError(
                    f"row {row}: the prompt has {len(prompt)} characters, far more than the model's {positions} "
                    "positions can hold: shorten it"
                )
            self._placeholders.check(prompt, row_images, f"row {row}")
        encoded, tokens = [], []
        for row, row_images in enumerate(images):
            encoded.append(self._encode(row_images, row))
            tokens.append(self._encode_text(texts[row], encoded[-1], add_special_tokens[row], row))
        return encoded, tokens

    def _encode(self, visuals: list[Visual], row: int) -> list[EncodedImage]:
        """The images and videos of one prompt, in its order."""
        kinds = ["video" if isinstance(visual, Video) else "image" for visual in visuals]
        names = [f"row {row}, {kind} {number}" for number, kind in enumerate(kinds)]
        stills = [(visual, name) for visual, name in zip(visuals, names) if not isinstance(visual, Video)]
        loaded: list[Image.Image] = [load_image(source, name) for source, name in stills]
        images = iter(self.layout.encode(loaded, [name for _, name in stills], self.special_tokens))
        encoded = []
        for visual, name in zip(visuals, names):
            if not isinstance(visual, Video):
                encoded.append(next(images))
            elif isinstance(self.layout, VideoLayout):
                encoded.append(self.layout.encode_video(visual, name, self.special_tokens))
        return encoded

    def _encode_text(self, prompt: str, images: list[EncodedImage], add_special_tokens: bool, row: int) -> np.ndarray:
        """i32 token ids, with what stands for each image in the place of its image token."""
        expanded = self._placeholders.replaced(prompt, [(image.text, image.around) for image in images])
        tokens = np.asarray(self.tokenizer.encode(expanded, add_special_tokens), np.int32)
        found, visual = int(np.isin(tokens, self._visual_ids).sum()), sum(len(image.index) for image in images)
        if found != visual or len(tokens) == 0:
            raise InputError(
                f"row {row}: the prompt has {len(tokens)} tokens, {found} of them visual, but its images "
                f"have {visual} features: the tokenizer does not keep {self.visual_token!r} whole in "
                f"{prompt[:80]!r}"
            )
        check_rows(tokens.tolist(), self.embedding_rows, self.tokenizer, f"row {row}")
        return tokens
