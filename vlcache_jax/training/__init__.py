"""Training and fine-tuning: answer-only cross entropy, a sharding-agnostic step, resumable state.

Fine-tuning a loaded model:

    vlm = vlc.load(folder, dtype="bfloat16", param_dtype="float32")
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))
    tuned, frozen = split(vlm.params, ("decoder", "projector"))
    step = make_train_step(answer_loss(vlm.model), optimizer)
    state = init_state(tuned, optimizer)
    for batch in batches:  # TrainBatch, see `pack`
        state, metrics = step(state, batch, frozen)

or its adapters alone: see `Lora`.
"""

from vlcache_jax.training.adapter_folder import load_adapters, save_adapters
from vlcache_jax.training.batch import Conversation, TrainBatch, pack
from vlcache_jax.training.checkpoint import load_state, save_state
from vlcache_jax.training.loop import ProgressLog, prefetch
from vlcache_jax.training.lora import Lora
from vlcache_jax.training.loss import answer_loss, make_eval_step
from vlcache_jax.training.parts import merge, split
from vlcache_jax.training.state import TrainState, init_state, make_train_step

__all__ = [
    "Conversation", "Lora", "ProgressLog", "TrainBatch", "TrainState", "answer_loss", "init_state", "load_adapters",
    "load_state", "make_eval_step", "make_train_step", "merge", "pack", "prefetch", "save_adapters", "save_state",
    "split",
]  # fmt: skip
