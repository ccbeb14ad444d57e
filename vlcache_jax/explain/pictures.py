"""A picture of what a compressed cache kept: where in the image, in which layers, and how much."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlcache_jax.errors import InputError
from vlcache_jax.explain.shown import shown
from vlcache_jax.inference.context import Context
from vlcache_jax.inference.report import Report
from vlcache_jax.inputs import TEXT, Batch
from vlcache_jax.models.families.family import ImageLayout
from vlcache_jax.models.text.arguments import Visual
from vlcache_jax.parallel.mesh import check_known
from vlcache_jax.policies.budget import ByteShare, budget_text
from vlcache_jax.policies.methods.method import title_of
from vlcache_jax.terminal.table import megabytes, percent

Kept = list[np.ndarray]
"""For each layer the kept prompt positions, i32 [kv_heads, n], ascending, -1 beyond the kept ones."""

_PAPER, _INK, _GREY, _TRACK, _LINE = (255, 255, 255), (28, 35, 43), (110, 120, 131), (238, 240, 243), (221, 225, 230)
_VISUAL, _TEXT = (222, 91, 36), (43, 98, 150)  # kept visual tokens and kept text tokens
_WIDTH, _MARGIN, _GAP = 1600, 56, 20
_SHEET_WIDTH, _SHEET_HEIGHT, _SHEET_GAP = 860, 600, 12  # of the large overlay, at most; between its images
_SHEET_COLUMN = 520  # width of its column, at least
_MAX_TILES = 12


def kept_by_layer(ctx: Context, row: int) -> Kept:
    """What a row of a context kept, copied to the host."""
    store = ctx.stores[0]
    check_known(store.positions, "the context's positions")
    return [np.asarray(store.kept_positions(layer)[row]) for layer in range(store.lengths.shape[1])]


def explain(
    images: Sequence[Visual],
    batch: Batch,
    kept: Context | Sequence[np.ndarray],
    report: Report,
    layout: ImageLayout,
    *,
    row: int = 0,
    question: str = "",
    answer: str = "",
) -> Image.Image:
    """Draws which visual tokens a row kept, over its images, beside the budgets of the layers.

    The large overlay shows, for every place in the images, the share of layers and KV heads that kept its token; the
    small ones the share of KV heads in one layer (of more than 12 layers, evenly spaced ones). Where LLaVA-NeXT's
    coarse and fine tokens overlap, the larger share counts. Of a video its frames are drawn, or 24 of them; of models
    that take frames in pairs, the first of each pair.

    Args:
      images: of the row, and videos, in the order of the prompt.
      batch: the prompts, of which `row` is drawn.
      kept: the context as `compress` returned it; or, for each layer, the row's kept positions i32 [kv_heads, n], -1
        beyond them (`ctx.kept_positions(layer)[row]`).
      report: of the same run.
      layout: of the processor that made the batch, `vlm.processor.layout`.
      row: which row of the batch.
      question: for the title; the prompt's text.
      answer: for the title; what the model answered.

    Returns:
      An RGB image, 1600 pixels wide.

    Raises:
      InputError: no such row, or images that are not those of the row.

    Example:
      ctx = vlc.compress(vlm.model, vlm.params, batch, policy)
      explain([img], batch, ctx, ctx.report, vlm.processor.layout, question="What ...?").save("kept.png")
    """
    if not 0 <= row < batch.size:
        raise InputError(f"row={row} does not exist: the batch has rows 0 to {batch.size - 1}")
    check_known(batch.vision_index, "the batch's arrays")
    layers = kept_by_layer(kept, row) if isinstance(kept, Context) else [np.asarray(layer) for layer in kept]
    pictures, regions = shown(images, layout)
    shares = _Shares.count(layers, np.asarray(batch.vision_index)[row], int(batch.lengths[row]))
    if sum(map(len, regions)) != shares.visual.shape[1]:
        raise InputError(
            f"the {len(images)} images have {sum(map(len, regions))} visual tokens, row {row} of the batch has "
            f"{shares.visual.shape[1]}: give the images of that row, in the order of the prompt"
        )
    return _draw(_Sheet.arrange(pictures, regions), shares, report, row, question, answer)


@dataclasses.dataclass(frozen=True)
class _Shares:
    """What was kept, counted.

    Attributes:
      visual: f32 [layers, visual tokens], share of KV heads that kept each visual token.
      visual_count: f32 [layers], kept visual tokens, averaged over heads.
      text_count: f32 [layers], kept text tokens, likewise.
      length: of the prompt.
    """

    visual: np.ndarray
    visual_count: np.ndarray
    text_count: np.ndarray
    length: int

    @classmethod
    def count(cls, layers: Sequence[np.ndarray], vision_index: np.ndarray, length: int) -> "_Shares":
        share = np.zeros((len(layers), length), np.float32)
        for layer, positions in enumerate(layers):
            heads, _ = positions.shape
            np.add.at(share[layer], positions[positions >= 0], 1 / heads)
        is_visual = vision_index[:length] != TEXT
        return cls(share[:, is_visual], share[:, is_visual].sum(axis=1), share[:, ~is_visual].sum(axis=1), length)


@dataclasses.dataclass(frozen=True)
class _Sheet:
    """Images side by side in one or more rows, scaled to one height.

    Attributes:
      image: all of them; None if there are none.
      regions: f32 [visual tokens, 4] on the sheet, clipped to the token's image; NaN without a place.
      covered: bool [height, width], where images lie (not the gaps between them).
    """

    image: Image.Image | None
    regions: np.ndarray
    covered: np.ndarray

    @classmethod
    def arrange(cls, pictures: list[Image.Image], regions: list[np.ndarray]) -> "_Sheet":
        if not pictures:
            return cls(None, np.zeros((0, 4), np.float32), np.zeros((1, 1), bool))
        rows, height = _fit([p.width / p.height for p in pictures])
        widths = [max(1, round(p.width * height / p.height)) for p in pictures]
        row_widths = [sum(widths[i] for i in row) + _SHEET_GAP * (len(row) - 1) for row in rows]
        size = (max(row_widths), height * len(rows) + _SHEET_GAP * (len(rows) - 1))
        sheet, covered = Image.new("RGB", size, _PAPER), np.zeros(size[::-1], bool)
        placed, outline = [], ImageDraw.Draw(sheet)
        for number, row in enumerate(rows):
            left, top = 0, number * (height + _SHEET_GAP)
            for i in row:
                picture, width = pictures[i], widths[i]
                sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (left, top))
                covered[top : top + height, left : left + width] = True
                outline.rectangle((left, top, left + width - 1, top + height - 1), outline=_LINE)
                boxes = regions[i] * np.array([width / picture.width, height / picture.height] * 2)
                placed.append(np.clip(boxes, 0, [width, height] * 2) + np.array([left, top] * 2))
                left += width + _SHEET_GAP
        return cls(sheet, np.concatenate(placed), covered)

    def heat(self, share: np.ndarray) -> np.ndarray:
        """f32 [height, width]: the share of the token at each pixel; the largest where regions overlap."""
        heat = np.zeros(self.covered.shape, np.float32)
        boxes = np.nan_to_num(np.round(self.regions)).astype(int)
        for value, (left, top, right, bottom) in zip(share, boxes, strict=True):
            if value > 0:
                cell = heat[top:bottom, left:right]
                np.maximum(cell, value, out=cell)
        return heat

    def overlay(self, share: np.ndarray) -> Image.Image:
        """The dimmed image, with kept places lit in colour."""
        assert self.image is not None
        grey = np.asarray(self.image.convert("L"), np.float32)[..., None]
        dimmed = 255 - (255 - grey) * 0.34
        heat = self.heat(share)[..., None]
        strength = np.where(heat > 0, 0.5 + 0.5 * heat, 0)
        # Like a marker pen on a pale print: one scale of colours, whatever the image's own.
        lit = _heat_colour(heat) * (255 - (255 - grey) * 0.55) / 255
        out = dimmed * (1 - strength) + lit * strength
        out[~self.covered] = 255
        return Image.fromarray(np.clip(out, 0, 255).astype(np.uint8))


def _fit(aspects: list[float]) -> tuple[list[list[int]], int]:
    """Rows of image numbers that fill the room for the sheet best, and the height of each row."""

    def height(rows: list[list[int]]) -> float:
        across = min((_SHEET_WIDTH - _SHEET_GAP * (len(row) - 1)) / sum(aspects[i] for i in row) for row in rows)
        return min(across, (_SHEET_HEIGHT - _SHEET_GAP * (len(rows) - 1)) / len(rows))

    numbers = np.arange(len(aspects))
    splits = [[part.tolist() for part in np.array_split(numbers, count)] for count in range(1, len(aspects) + 1)]
    best = max(splits, key=height)
    return best, max(8, round(height(best)))


def _heat_colour(heat: np.ndarray) -> np.ndarray:
    """From yellow over the colour of visual tokens to a dark red, f32 [..., 3]."""
    low, middle, high = (np.array(colour, np.float32) for colour in ((255, 214, 79), _VISUAL, (176, 27, 46)))
    return np.where(heat < 0.5, low + (middle - low) * 2 * heat, middle + (high - middle) * (2 * heat - 1))


def _draw(sheet: _Sheet, shares: _Shares, report: Report, row: int, question: str, answer: str) -> Image.Image:
    canvas = Image.new("RGB", (_WIDTH, 6000), _PAPER)  # cropped at the end
    draw = ImageDraw.Draw(canvas)
    y = _header(draw, report, row, shares, question, answer)
    y = max(_overlay(canvas, draw, y, sheet, shares), _bars(draw, y, sheet, shares))
    y = _tiles(canvas, draw, y, sheet, shares)
    return canvas.crop((0, 0, _WIDTH, y + _MARGIN))


def _header(draw: ImageDraw.ImageDraw, report: Report, row: int, shares: _Shares, question: str, answer: str) -> int:
    """Title and figures; returns where the next block starts."""
    y = _MARGIN + 22
    draw.text(
        (_MARGIN, y),
        f"{title_of(report.policy)}  ·  budget {budget_text(report.budget)}",
        _VISUAL,
        _font(25),
        anchor="ls",
    )
    y += 12
    for line in _wrap(question, 40, _WIDTH - 2 * _MARGIN, 2):
        y += 50
        draw.text((_MARGIN, y), line, _INK, _font(40), anchor="ls")
    if answer:
        y += 10
        indent = _MARGIN + round(_font(30).getlength("Answer")) + 20
        draw.text((_MARGIN, y + 42), "Answer", _GREY, _font(30), anchor="ls")
        for line in _wrap(answer, 30, _WIDTH - _MARGIN - indent, 2):
            y += 42
            draw.text((indent, y), line, _VISUAL, _font(30), anchor="ls")
    y += 36
    draw.line((_MARGIN, y, _WIDTH - _MARGIN, y), _LINE, 2)
    visual = shares.visual.shape[1]
    rows = len(report.prompt_lengths)
    of_batch = f"of all {rows} rows, " if rows > 1 else ""
    kept = "tokens at the most bits" if isinstance(report.budget, ByteShare) else "cache kept"
    figures = [
        (percent(float(report.kept_fraction[row])), f"of the prompt's {kept}"),
        (f"{shares.length:,}", f"prompt tokens: {visual:,} visual, {shares.length - visual:,} text"),
        (megabytes(report.state_bytes), f"prompt's cache {of_batch}instead of {megabytes(report.full_bytes)}"),
    ]
    y += 62
    column = (_WIDTH - 2 * _MARGIN) // len(figures)
    for number, (figure, caption) in enumerate(figures):
        draw.text((_MARGIN + number * column, y), figure, _INK, _font(44), anchor="ls")
        draw.text((_MARGIN + number * column, y + 34), caption, _GREY, _font(22), anchor="ls")
    return y + 34 + 56


def _overlay(canvas: Image.Image, draw: ImageDraw.ImageDraw, y: int, sheet: _Sheet, shares: _Shares) -> int:
    """The large overlay and its scale; returns where it ends."""
    if sheet.image is None:
        return y
    draw.text((_MARGIN, y), "Where: all layers together", _INK, _font(25), anchor="ls")
    y += 22
    mean = shares.visual.mean(axis=0)
    most = float(mean.max(initial=0.0))
    canvas.paste(sheet.overlay(mean / most if most else mean), (_MARGIN, y))
    y += sheet.image.height + 18
    width, caption = 140, "share of layers and KV heads that kept a patch"
    heat = np.linspace(0, 1, width)[None, :, None]
    colours = 255 - (255 - _heat_colour(heat)) * (0.5 + 0.5 * heat)
    scale = Image.fromarray(np.repeat(colours, 14, axis=0).astype(np.uint8))
    x = _MARGIN + round(_font(20).getlength("0 %")) + 10
    draw.text((_MARGIN, y + 14), "0 %", _GREY, _font(20), anchor="ls")
    canvas.paste(scale, (x, y))
    draw.text((x + width + 10, y + 14), percent(most), _GREY, _font(20), anchor="ls")
    x += width + 10 + round(_font(20).getlength(percent(most))) + 24
    end = _MARGIN + max(sheet.image.width, _SHEET_COLUMN)
    if x + _font(20).getlength(caption) > end:
        x, y = _MARGIN, y + 30
    draw.text((x, y + 14), _cut(caption, 20, end - x), _GREY, _font(20), anchor="ls")
    return y + 20


def _bars(draw: ImageDraw.ImageDraw, y: int, sheet: _Sheet, shares: _Shares) -> int:
    """Kept tokens per layer as horizontal bars; returns where they end."""
    left = _MARGIN if sheet.image is None else _MARGIN + max(sheet.image.width, _SHEET_COLUMN) + 64
    right, layers = _WIDTH - _MARGIN, len(shares.visual_count)
    draw.text((left, y), "How much: kept tokens per layer", _INK, _font(25), anchor="ls")
    y += 22
    x = left
    for colour, name in ((_VISUAL, "visual"), (_TEXT, "text"), (_TRACK, f"full length, {shares.length:,}")):
        draw.rounded_rectangle((x, y + 6, x + 18, y + 24), 4, colour)
        draw.text((x + 26, y + 22), name, _GREY, _font(20), anchor="ls")
        x += 26 + round(_font(20).getlength(name)) + 28
    y += 44
    room = max(260, (_SHEET_HEIGHT if sheet.image is None else sheet.image.height) - 44)
    pitch = min(84.0, max(9.0, room / layers))
    thickness = min(30, max(5, round(pitch * 0.56)))
    every = 1 if pitch >= 18 else 4 if pitch >= 12 else 8
    size = 20 if pitch >= 24 else 17
    start, stop = left + 52, right - 66
    for layer in range(layers):
        top = y + pitch * layer + (pitch - thickness) / 2
        middle = top + thickness / 2
        visual, text = float(shares.visual_count[layer]), float(shares.text_count[layer])
        unit = (stop - start) / shares.length
        radius = min(4, thickness // 3)
        draw.rounded_rectangle((start, top, stop, top + thickness), radius, _TRACK)
        split, end = start + visual * unit, start + (visual + text) * unit
        if visual:
            draw.rounded_rectangle((start, top, max(split, start + 1), top + thickness), radius, _VISUAL)
        if text:
            draw.rounded_rectangle((split, top, max(end, split + 2), top + thickness), radius, _TEXT)
        if layer % every == 0:
            draw.text((start - 14, middle), f"L{layer}", _GREY, _font(size), anchor="rm")
            draw.text((right, middle), f"{visual + text:,.0f}", _INK, _font(size), anchor="rm")
    return round(y + pitch * layers)


def _tiles(canvas: Image.Image, draw: ImageDraw.ImageDraw, y: int, sheet: _Sheet, shares: _Shares) -> int:
    """One small overlay per layer; returns where they end."""
    if sheet.image is None:
        return y
    layers = len(shares.visual_count)
    count = layers if layers <= _MAX_TILES else _MAX_TILES - 1  # with the image itself, two full rows
    chosen = [round(i * (layers - 1) / max(1, count - 1)) for i in range(count)]
    aspect = sheet.image.width / sheet.image.height
    columns = count + 1
    if _tile_width(columns) / aspect < 130:  # too small to see anything: two rows
        columns = -(-columns // 2)
    width = min(_tile_width(columns), round(300 * aspect))
    height = round(width / aspect)
    y += 64
    title = "Layer by layer" if count == layers else f"Layer by layer ({count} of {layers})"
    draw.text((_MARGIN, y), title, _INK, _font(25), anchor="ls")
    x = _MARGIN + round(_font(25).getlength(title)) + 18
    draw.text((x, y), "share of KV heads that kept a patch, and kept visual tokens", _GREY, _font(20), anchor="ls")
    y += 22
    captions = [("image", ""), *((f"L{layer}", f"{shares.visual_count[layer]:,.0f}") for layer in chosen)]
    for number, (name, kept) in enumerate(captions):
        picture = sheet.overlay(shares.visual[chosen[number - 1]]) if number else sheet.image
        x = _MARGIN + number % columns * (width + _GAP)
        top = y + number // columns * (height + 58)
        canvas.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (x, top))
        draw.text((x, top + height + 26), name, _INK, _font(20), anchor="ls")
        draw.text((x + width, top + height + 26), kept, _GREY, _font(20), anchor="rs")
    return y + -(-len(captions) // columns) * (height + 58) - 58 + 34


def _tile_width(columns: int) -> int:
    return (_WIDTH - 2 * _MARGIN - _GAP * (columns - 1)) // columns


def _wrap(text: str, size: int, width: int, lines: int) -> list[str]:
    """At most `lines` lines of at most `width` pixels; what does not fit ends in an ellipsis."""
    font, line = _font(size), ""
    done: list[str] = []
    words = text.split()
    for number, word in enumerate(words):
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if len(done) == lines - 1:
            return [*done, _cut(" ".join([line, *words[number:]]).strip(), size, width)]
        if line:
            done.append(line)
        line = word if font.getlength(word) <= width else _cut(word, size, width)
    return [*done, line] if line else done


def _cut(text: str, size: int, width: int) -> str:
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
