"""`vlcache-jax demo`: the shipped checkpoint answers questions, with the full cache and with a compressed one.

All questions form one batch, so that the whole demo compiles one prefill and one decoding program per policy.
"""

import argparse
import json
import time

from vlcache_jax.cli.checkpoint import keep_programs, open_checkpoint
from vlcache_jax.cli.options import check_picture_path
from vlcache_jax.cli.parser import MAX_NEW_TOKENS
from vlcache_jax.cli.process import emit
from vlcache_jax.cli.runtime import describe_runtime
from vlcache_jax.demo.assets import IMAGES, MODEL, Question, demo_assets, make_batch, read_questions
from vlcache_jax.demo.page import Outcome
from vlcache_jax.errors import InputError
from vlcache_jax.evaluation.answering import answer
from vlcache_jax.files.writing import write_picture
from vlcache_jax.inference.recipe import recipe_by_name
from vlcache_jax.models.images.opening import load_image
from vlcache_jax.policies import FullCache
from vlcache_jax.terminal.progress import Progress

OWN_IMAGE = (
    "this small model reads only pages, price lists and scenes of the kind it was trained on (see demo_images/ in the "
    "package); about any other image it makes something up. `vlcache-jax generate --model ...` asks a model of yours"
)


def run(arguments: argparse.Namespace, progress: Progress) -> None:
    """Runs the command; everything that can be checked is checked before weights are read."""
    start = time.monotonic()
    picture_path = check_picture_path(arguments.explain)
    recipe = recipe_by_name(arguments.policy)
    if bool(arguments.image) != (arguments.question is not None):
        raise InputError("--image and --question belong together: give both, or neither for the shipped questions")
    assets = demo_assets(arguments.assets)
    if arguments.image and arguments.assets is None:
        progress.note(OWN_IMAGE)
    progress.step("reading images and questions")
    if arguments.image:
        images = [load_image(path, f"image {number}") for number, path in enumerate(arguments.image, 1)]
        questions = [Question("yours", images, arguments.question, None)]
    else:
        questions = read_questions(assets / IMAGES)
    opened = open_checkpoint(assets / MODEL, None)
    batch = make_batch(opened.processor, questions)
    opened.check(batch, recipe, MAX_NEW_TOKENS)
    keep_programs(not arguments.no_compilation_cache, progress)
    progress.step("loading the weights")
    ready = time.monotonic()
    vlm = opened.load("stacked")  # a few short answers: quicker to compile counts for more than quicker to decode
    loaded = time.monotonic()

    runs = {
        name: answer(vlm, batch, what, MAX_NEW_TOKENS, progress)
        for name, what in (("full", FullCache()), ("compressed", recipe))
    }
    progress.close()
    texts = {name: vlm.processor.decode(answers) for name, answers in runs.items()}
    seconds = {"inputs": ready - start, "load": loaded - ready, "total": time.monotonic() - start}
    outcome = Outcome(questions, batch, runs, texts, seconds)
    if arguments.json:
        emit(json.dumps(outcome.as_dict() | describe_runtime(), ensure_ascii=False, indent=2))
    else:
        emit(outcome.page(vlm.model.spec, opened.dtype))
    if picture_path is not None:
        first, text = questions[0], texts["compressed"][0]
        write_picture(picture_path, runs["compressed"].picture(vlm, first.images, batch, first.question, text))
