"""Scores of answers given as text, and how sure their means are."""

from vlcache_jax.evaluation.metrics.anls import anls, edit_distance
from vlcache_jax.evaluation.metrics.bleu import bleu
from vlcache_jax.evaluation.metrics.bootstrap import Interval, bootstrap_interval
from vlcache_jax.evaluation.metrics.cider import cider_d
from vlcache_jax.evaluation.metrics.contained import contained
from vlcache_jax.evaluation.metrics.exact_match import exact_match
from vlcache_jax.evaluation.metrics.math_answer import math_answer
from vlcache_jax.evaluation.metrics.open_answer import open_answer
from vlcache_jax.evaluation.metrics.option_letter import option_letter
from vlcache_jax.evaluation.metrics.ptb import ptb_tokens
from vlcache_jax.evaluation.metrics.relaxed_accuracy import relaxed_accuracy
from vlcache_jax.evaluation.metrics.rouge import rouge_l
from vlcache_jax.evaluation.metrics.vqa import vqa_accuracy

__all__ = [
    "Interval", "anls", "bleu", "bootstrap_interval", "cider_d", "contained", "edit_distance", "exact_match",
    "math_answer", "open_answer", "option_letter", "ptb_tokens", "relaxed_accuracy", "rouge_l", "vqa_accuracy",
]  # fmt: skip
