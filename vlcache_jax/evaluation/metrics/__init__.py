"""Scores of answers given as text, and how sure their means are."""

from vlcache_jax.evaluation.metrics.anls import anls, edit_distance
from vlcache_jax.evaluation.metrics.bootstrap import Interval, bootstrap_interval
from vlcache_jax.evaluation.metrics.cider import cider_d
from vlcache_jax.evaluation.metrics.contained import contained
from vlcache_jax.evaluation.metrics.exact_match import exact_match
from vlcache_jax.evaluation.metrics.option_letter import option_letter
from vlcache_jax.evaluation.metrics.ptb import ptb_tokens
from vlcache_jax.evaluation.metrics.relaxed_accuracy import relaxed_accuracy
from vlcache_jax.evaluation.metrics.vqa import vqa_accuracy

__all__ = [
    "Interval",
    "anls",
    "bootstrap_interval",
    "cider_d",
    "contained",
    "edit_distance",
    "exact_match",
    "option_letter",
    "ptb_tokens",
    "relaxed_accuracy",
    "vqa_accuracy",
]
