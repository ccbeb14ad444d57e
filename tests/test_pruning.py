"""Visual tokens that are dropped between layers: PyramidDrop, and what any pruning method rests on."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from text_model import TextModel, by_definition, text_batch
from tiers import cases, later
from tiny_models import one_row

import vlcache_jax as vlc
from vlcache_jax.inputs import TEXT
from vlcache_jax.models.decoder.config import DecoderConfig, RopeConfig
from vlcache_jax.models.decoder.layout import arranged
from vlcache_jax.policies.methods.method import METHODS
from vlcache_jax.pruning.method import Pruning
from vlcache_jax.pruning.plan import plan

LAYERS, CUTS, KEEP, LENGTH, NEW = 5, (1, 3, 4), (0.5, 0.25, 0.1), 64, 6
LENGTHS = [60, 41, 22, 7]  # both images and text; both, the second at the end; an image cut short; hardly any
IMAGES = ((2, 16), (25, 16))
ROOMS = (48, 40, 32)
PRUNE = vlc.PyramidDrop(CUTS, KEEP, rooms=ROOMS)
CONFIG = DecoderConfig(
    family="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=LAYERS, num_heads=4, num_kv_heads=2,
    head_dim=8, max_positions=256, rope=RopeConfig(theta=1e4), rms_norm_eps=1e-5,
)  # fmt: skip


def shapes_of(model):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), text_batch([3], 16)))["params"]


def build(dtype="float32", config=CONFIG, **options):
    model = TextModel(config, jnp.dtype(dtype), **options)
    rng = np.random.default_rng(3)

    def draw(path, leaf):
        if path[-1].key == "scale":
            return rng.uniform(0.7, 1.3, leaf.shape).astype(dtype)
        return ((0.25 if len(leaf.shape) > 2 else 0.05) * rng.normal(size=leaf.shape)).astype(dtype)

    return model, jax.tree_util.tree_map_with_path(draw, shapes_of(model))


@pytest.fixture(scope="module")
def tiny():
    return build()


@pytest.fixture(scope="module")
def batch():
    return text_batch(LENGTHS, LENGTH, images=IMAGES)


def visual_of(batch, row):
    """The visual tokens that may go: the last token of a prompt stays."""
    index = np.asarray(batch.vision_index)[row, : int(batch.lengths[row]) - 1]
    return np.flatnonzero(index != TEXT)


def attention_of_the_last(params, layer, hidden, places):
    """Mean over heads of the last token's attention at the entrance of a layer, in numpy, from the formula."""
    weights = jax.tree.map(lambda x: np.asarray(x[layer], np.float64), params["decoder"]["layers"])
    hidden = np.asarray(hidden, np.float64)
    x = hidden / np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + 1e-5) * weights["input_norm"]["scale"]

    def heads(name):
        y = (x @ weights["attention"][name]["kernel"]).reshape(len(x), -1, 8)
        angle = places[:, None, None] * 1e4 ** -(np.arange(4) / 4)
        first, second = y[..., :4], y[..., 4:]
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    query, key = heads("query")[-1], np.repeat(heads("key"), 2, axis=1)
    logits = np.einsum("hd,shd->hs", query, key) / np.sqrt(8)
    weight = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (weight / weight.sum(axis=1, keepdims=True)).mean(axis=0)


def defined(model, params, batch, row):
    """(the tokens of every stage, the next token's logits) of a row by itself: layers in turn, then a choice."""
    n = int(batch.lengths[row])
    visual, apply = visual_of(batch, row), partial(model.apply, {"params": params})
    hidden = apply(one_row(batch, row), method="embed").hidden
    places, stages = np.arange(n), []

    def attend(query, key, value, carry, xs):
        key, value = (jnp.repeat(x, 2, axis=2) for x in (key, value))
        logits = jnp.einsum("bthd,bshd->bhts", query, key, precision="highest") / 8**0.5
        weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones(logits.shape[2:], bool)), logits, -jnp.inf), axis=-1)
        return jnp.einsum("bhts,bshd->bthd", weights, value, precision="highest"), carry, None

    for start, end, keep in zip((0, *CUTS), (*CUTS, LAYERS), (*KEEP, None)):
        stages.append(places.tolist())
        decode = partial(apply, attend=attend, method="decode", layers=(start, end))
        hidden = jax.jit(decode)(hidden, jnp.asarray(places)[None])[0]
        if keep is None:
            return stages, np.asarray(apply(hidden[0, -1], method="unembed"))
        scores = attention_of_the_last(params, end, hidden[0], places)
        left = [i for i, place in enumerate(places) if place in visual]
        best = sorted(left, key=lambda i: -scores[i])[: int(keep * len(visual))]
        stays = [i for i in range(len(places)) if i not in left or i in best]
        hidden, places = hidden[:, jnp.asarray(stays)], places[stays]


def stages_of(ctx):
    """[layer][row] tokens of an uncompressed context."""
    kept = [np.asarray(ctx.kept_positions(layer))[:, 0] for layer in range(LAYERS)]
    return [[row[row >= 0].tolist() for row in layer] for layer in kept]


def of_layers(stages):
    """Of every layer, from what every stage has."""
    return [stages[sum(layer >= cut for cut in CUTS)] for layer in range(LAYERS)]


def test_a_range_of_layers_is_a_part_of_all(tiny, batch):
    model, params = tiny
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 32)).astype("float32"))

    def attend(query, key, value, carry, x):
        return query * 0.5 + x.astype(jnp.float32), carry + x, key

    for layout in ("stacked", "apart"):
        other = dataclasses.replace(model, layout=layout)
        weights = params if layout == "stacked" else arranged(params, shapes_of(other), False)
        run = partial(other.apply, {"params": weights}, method="decode")
        more = jnp.ones((2, *hidden.shape))
        whole = run(hidden, jnp.arange(12)[None], attend, 0, jnp.arange(LAYERS), layer_inputs=more)
        x, carry, keys = hidden, 0, []
        for start, end in ((0, 1), (1, 4), (4, LAYERS)):
            xs = jnp.arange(start, end)
            x, carry, key = run(x, jnp.arange(12)[None], attend, carry, xs, layer_inputs=more, layers=(start, end))
            keys.append(key)
        np.testing.assert_allclose(x, whole[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.concatenate(keys), whole[2], rtol=1e-5, atol=1e-5)
        assert carry == whole[1]


def test_pyramid_drop_by_its_definition(tiny, batch):
    model, params = tiny
    ctx = vlc.prefill(model, params, batch, vlc.FullCache(), pruning=PRUNE)
    found = stages_of(ctx)
    for row, n in enumerate(LENGTHS):
        stages, logits = defined(model, params, batch, row)
        assert [layer[row] for layer in found] == of_layers(stages)
        np.testing.assert_allclose(ctx.logits[row], logits, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(ctx.report.stage_tokens[row], [len(stage) for stage in stages])
        visual = len(visual_of(batch, row))
        assert [len(stage) for stage in stages] == [n, *(n - visual + int(keep * visual) for keep in KEEP)]
    assert np.asarray(ctx.report.exact).all()
    np.testing.assert_array_equal(ctx.next_position, LENGTHS)


def test_the_cache_is_as_large_as_the_stages(tiny, batch):
    model, params = tiny
    report = vlc.prefill(model, params, batch, vlc.FullCache(), pruning=PRUNE).report
    slots = sum(of_layers([-(-room // 16) * 16 for room in (LENGTH, *ROOMS)]))
    assert report.state_bytes == len(LENGTHS) * (2 * slots * (2 * 8 * 4 + 4) + 2 * 4 * LAYERS)
    assert report.full_bytes == vlc.prefill(model, params, batch, vlc.FullCache()).report.state_bytes
    in_codes = vlc.prefill(model, params, batch, vlc.FullCache(bits=8), pruning=PRUNE)
    assert stages_of(in_codes) == stages_of(vlc.prefill(model, params, batch, vlc.FullCache(), pruning=PRUNE))
    assert in_codes.report.state_bytes < vlc.prefill(model, params, batch, vlc.FullCache(bits=8)).report.state_bytes


@pytest.mark.parametrize("kind", ["plain", "three axes, blocks"])
@pytest.mark.parametrize("policy", [vlc.FullCache(), vlc.VLCache(0.3), vlc.AdaKV(0.4)], ids=lambda p: p.name)
def test_decoding_is_the_full_model_with_the_rest_masked_out(batch, kind, policy):
    """Each layer's mask leaves the tokens of its stage to the prompt, and what was kept to the answer."""
    options = {}
    if kind != "plain":
        options = {"side": 4, "axes": True, "blocks": True}
        config = dataclasses.replace(CONFIG, rope=RopeConfig(theta=1e4, sections=(2, 1, 1)))
        options["config"] = config
    model, params = build(**options)
    there = stages_of(vlc.prefill(model, params, batch, vlc.FullCache(), pruning=PRUNE))
    logits, state = vlc.prefill(model, params, batch, policy, pruning=PRUNE).start(NEW)
    tokens, found, first = [jnp.argmax(logits, axis=-1)], [], state
    for _ in range(NEW - 1):
        logits, state = vlc.decode_step(model, params, tokens[-1], state)
        tokens.append(jnp.argmax(logits, axis=-1))
        found.append(np.asarray(logits))
    kept = [np.asarray(first.kept_positions(layer)) for layer in range(LAYERS)]
    for of_layer, stages in zip(kept, there):
        assert all(set(held[held >= 0]) <= set(stage) for held, stage in zip(of_layer, stages))
    expected = by_definition(model, params, batch, np.asarray(tokens[:-1]), kept, there=there)
    np.testing.assert_allclose(np.stack(found), expected, atol=2e-4, rtol=0)


POLICIES = {name: method.make() for name, method in METHODS.items() if name != "kv_zip"} | {  # which refuses pruning
    "candidates": vlc.VLCache(0.2, candidate_fraction=0.5),
    "others at 2 bits": vlc.SnapKV(0.4, evicted=vlc.Quantise(2)),
    "bytes": vlc.SnapKV(budget=vlc.Bytes(40000)),
    "mass": vlc.VLCache(budget=vlc.Mass(0.8, cap=0.5)),
    "evict": vlc.H2O(0.4, decoding="evict"),
    "evict, tokens": vlc.TOVA(40, decoding="evict"),
    "recompress": vlc.SnapKV(0.4, decoding="recompress:4"),
    "window": vlc.StreamingLLM(0.4, decoding="window:4"),
    "nearly all": vlc.VLCache(0.9),
}
FIRST = ("vl_cache", "candidates", "evict, tokens")


@pytest.mark.parametrize("policy", cases(POLICIES, FIRST))
def test_every_policy_and_rule(tiny, batch, policy):
    """A row keeps of each stage, and says, what it does alone or beside others; all that is kept is of the stage."""
    model, params = tiny
    there = stages_of(vlc.prefill(model, params, batch, vlc.FullCache(), pruning=PRUNE))
    run = partial(vlc.generate, model, params, policy=policy, max_new_tokens=12, eos_token_ids=[], pruning=PRUNE)
    out, ctx = run(batch), vlc.prefill(model, params, batch, policy, pruning=PRUNE)
    assert np.asarray(out.report.finite).all()
    if policy.candidate_fraction is None:
        assert np.asarray(out.report.exact).all()
    assert out.report.state_bytes == ctx.nbytes
    if isinstance(policy.budget, vlc.Bytes):
        assert ctx.nbytes <= len(LENGTHS) * policy.budget.count
    for layer in range(LAYERS):
        for row, kept in enumerate(np.asarray(ctx.kept_positions(layer))):
            assert set(kept[kept >= 0].tolist()) <= set(there[layer][row])
            assert (kept.max(axis=-1) == LENGTHS[row] - 1).all()
    for row in (1, 2):
        if policy == POLICIES[FIRST[0]]:
            other_batch = one_row(batch, row, LENGTH)
        else:  # or beside other rows: so nothing is compiled for it
            other_batch = jax.tree.map(lambda x: np.asarray(x)[[row, 3, 0, 3]], batch)  # noqa: B023
        alone = vlc.prefill(model, params, other_batch, policy, pruning=PRUNE)
        for layer in range(LAYERS):
            mine, other = (np.asarray(x.kept_positions(layer)) for x in (alone, ctx))
            np.testing.assert_array_equal(mine[0], other[row, :, : mine.shape[2]])
        single = run(other_batch)
        np.testing.assert_array_equal(single.tokens[0], out.tokens[row])
        np.testing.assert_array_equal(single.report.kept[0], out.report.kept[row])


def test_a_part_of_1_is_no_pruning(tiny, batch):
    model, params = tiny
    plain, whole = (
        vlc.prefill(model, params, batch, vlc.VLCache(0.3), pruning=pruning)
        for pruning in (None, vlc.PyramidDrop((1, 2), (1.0, 1)))
    )
    np.testing.assert_array_equal(plain.logits, whole.logits)
    for x, y in zip(jax.tree.leaves(plain.stores), jax.tree.leaves(whole.stores), strict=True):
        np.testing.assert_array_equal(x, y)
    half = vlc.prefill(model, params, batch, pruning=vlc.PyramidDrop((1, 2), (1.0, 0.5)))
    assert half.report.stage_tokens.shape == (len(LENGTHS), 2)


@dataclasses.dataclass(frozen=True)
class LastFirst(Pruning):
    """A method from outside: the latest visual tokens, by nothing but their place; `behind` may be 0, too."""

    behind: tuple[int, ...] = (2,)
    part: int = 2

    def cuts(self, layers):
        return self.behind

    def kept(self, cut, visual, left):
        return visual // self.part

    def scores(self, cut, between):
        assert between.stage.layers[1] == self.behind[cut]
        return between.stage.places.astype(jnp.float32)


@pytest.mark.parametrize(
    ("behind", "policy"), [((2,), vlc.FullCache()), ((0,), vlc.VLCache(0.5)), ((0, 3), vlc.FullCache())]
)
def test_a_method_from_outside(tiny, batch, behind, policy):
    model, params = tiny
    ctx = vlc.prefill(model, params, batch, policy, pruning=LastFirst(behind))
    for row, n in enumerate(LENGTHS):
        visual = visual_of(batch, row)
        left = set(range(n)) - set(visual[: len(visual) - len(visual) // 2].tolist())
        for layer in range(LAYERS):
            kept = np.asarray(ctx.kept_positions(layer))[row, 0]
            kept = set(kept[kept >= 0].tolist())
            wanted = left if layer >= behind[0] else set(range(n))
            assert kept == wanted if policy.keeps_all else kept <= wanted
    assert np.asarray(ctx.report.exact).all()


def test_a_method_that_drops_nothing_changes_nothing(tiny, batch):
    model, params = tiny
    plain = vlc.generate(model, params, batch, vlc.VLCache(0.3), NEW, eos_token_ids=[])
    whole = vlc.generate(model, params, batch, vlc.VLCache(0.3), NEW, eos_token_ids=[], pruning=LastFirst(part=1))
    np.testing.assert_array_equal(plain.tokens, whole.tokens)
    np.testing.assert_array_equal(plain.report.kept, whole.report.kept)


def test_inside_jit_and_without_rooms(tiny):
    """Outside, rooms are the buckets of what the rows keep; under a trace those that the method has, or all."""
    model, params = tiny
    batch = text_batch([150, 120], 192, images=((2, 130),))
    free = vlc.PyramidDrop(CUTS, KEEP)
    assert plan(free, model.spec, batch).rooms == (192, 128, 64, 64)
    tokens = []
    for pruning in (free, dataclasses.replace(free, rooms=(90, 64, 64))):
        run = partial(vlc.generate, model, policy=vlc.VLCache(0.3), max_new_tokens=NEW, eos_token_ids=[])
        run = partial(run, pruning=pruning)
        inside = jax.jit(lambda params, batch: run(params=params, batch=batch))(params, batch)  # noqa: B023
        tokens += [run(params=params, batch=batch).tokens, inside.tokens]
        np.testing.assert_array_equal(inside.report.stage_tokens[0], [150, 20 + 65, 20 + 32, 20 + 13])
    for other in tokens[1:]:
        np.testing.assert_array_equal(other, tokens[0])
    traced = jax.eval_shape(lambda b: vlc.prefill(model, params, b, pruning=free).stores[0].keys, batch)
    assert traced.shape[2] >= LAYERS * 192
    small = dataclasses.replace(free, rooms=(64, 64, 64))
    with pytest.raises(vlc.InputError, match=r"a row keeps 85 tokens behind 1 layers, but rooms=\(64, 64, 64\)"):
        vlc.prefill(model, params, batch, pruning=small)
    broken = jax.jit(lambda b: vlc.prefill(model, params, b, pruning=small).report.finite)(batch)
    assert np.asarray(broken).tolist() == [False, True]  # the second row fits


@pytest.mark.parametrize("shape", [(4, 2), *later((2, 4))])
def test_on_a_mesh(batch, shape):
    model, params = build(config=dataclasses.replace(CONFIG, num_heads=8, num_kv_heads=4))
    plain = vlc.generate(model, params, batch, vlc.VLCache(0.3), NEW, eos_token_ids=[], pruning=PRUNE)
    mesh = jax.make_mesh(shape, ("data", "model"), devices=jax.devices()[: shape[0] * shape[1]])
    placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    out = vlc.generate(model, placed, batch, vlc.VLCache(0.3), NEW, eos_token_ids=[], pruning=PRUNE)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_array_equal(out.report.kept, plain.report.kept)
    np.testing.assert_array_equal(out.report.stage_tokens, plain.report.stage_tokens)


def test_bfloat16_and_contexts_that_are_asked_and_saved(batch, tmp_path):
    model, params = build("bfloat16")
    ctx = vlc.compress(model, params, batch, vlc.VLCache(0.5), pruning=PRUNE)
    question = vlc.Continuation(np.full((4, 5), 9, np.int32), np.array([5, 3, 4, 2], np.int32))
    answers = vlc.answer(ctx, question, NEW, eos_token_ids=[]).tokens
    vlc.save_context(ctx, tmp_path / "ctx")
    again = vlc.load_context(tmp_path / "ctx", model, params)
    np.testing.assert_array_equal(vlc.answer(again, question, NEW, eos_token_ids=[]).tokens, answers)
    np.testing.assert_array_equal(again.report.stage_tokens, ctx.report.stage_tokens)
    streamed = list(vlc.stream(model, params, batch, vlc.VLCache(0.5), NEW, eos_token_ids=[], pruning=PRUNE))
    whole = vlc.generate(model, params, batch, vlc.VLCache(0.5), NEW, eos_token_ids=[], pruning=PRUNE)
    np.testing.assert_array_equal(np.stack(streamed, axis=1), whole.tokens)


class Spoilt(TextModel):
    """Hidden states of padding are large from the start."""

    def embed(self, batch, position_ids=None):
        embedded = super().embed(batch, position_ids)
        inside = jnp.arange(batch.length)[None] < jnp.asarray(batch.lengths)[:, None]
        return dataclasses.replace(embedded, hidden=jnp.where(inside[..., None], embedded.hidden, 1e4))


@pytest.mark.parametrize("policy", [vlc.FullCache(), vlc.VLCache(0.3)], ids=lambda p: p.name)
def test_padding_never_matters(tiny, batch, policy):
    model, params = tiny
    spoilt = Spoilt(CONFIG, model.dtype)
    clean, dirty = (
        vlc.generate(m, params, batch, policy, NEW, eos_token_ids=[], pruning=PRUNE) for m in (model, spoilt)
    )
    np.testing.assert_array_equal(clean.tokens, dirty.tokens)
    np.testing.assert_array_equal(clean.report.kept, dirty.report.kept)


def test_what_cannot_work_says_so(tiny, batch):
    model, params = tiny
    run = partial(vlc.prefill, model, params, batch)
    for build_it, message in (
        (lambda: vlc.PyramidDrop((1, 2), (0.2, 0.5)), "none above the one before"),
        (lambda: vlc.PyramidDrop((1, 2), (0.5,)), "as many layers as fractions"),
        (lambda: vlc.PyramidDrop((1,), (1.5,)), "from 0 to 1"),
        (lambda: run(pruning=vlc.PyramidDrop((1, 5), (0.5, 0.2))), r"behind layers \(1, 5\).*model's 5 layers"),
        (lambda: run(pruning=vlc.PyramidDrop((3, 2), (0.5, 0.2))), "give rising numbers"),
        (lambda: run(pruning=vlc.PyramidDrop((3,), (0.5,), rooms=(32, 32))), "give a padded length for each"),
        (lambda: run(pruning="pyramid_drop"), "is not a pruning method"),
        (lambda: run(pruning=LastFirst((1, 2), part=0.5)), "it can only drop"),
    ):
        with pytest.raises(vlc.PolicyError, match=message):
            build_it()
    windowed, weights = build(config=dataclasses.replace(CONFIG, windows=(9, None, 9, None, 9)))
    with pytest.raises(vlc.PolicyError, match="layers of this model have windows"):
        vlc.prefill(windowed, weights, batch, pruning=PRUNE)
