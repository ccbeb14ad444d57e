"""Published configurations, for planning without a checkpoint."""

from vlcache_jax.models.decoder.config import DecoderConfig, RopeConfig
from vlcache_jax.models.families.llava.config import LlavaConfig
from vlcache_jax.models.vision.config import VisionConfig

# CLIP ViT-L/14 at 336 pixels. It has 24 layers; LLaVA takes its features from the 23rd, so the last one is not run.
_CLIP_L_336 = VisionConfig(
    hidden_size=1024, intermediate_size=4096, num_layers=23, num_heads=16, image_size=336, patch_size=14
)
_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

# Sources: config.json and generation_config.json of the repositories llava-hf/<name>-hf on the Hugging Face Hub, and of
# the language models they name (vicuna-7b-v1.5, Mistral-7B-Instruct-v0.2, Nous-Hermes-2-Yi-34B).
PRESETS = {
    "llava-1.5-7b": LlavaConfig(
        model_type="llava",
        vision=_CLIP_L_336,
        decoder=DecoderConfig(
            family="llama",
            vocab_size=32064,
            hidden_size=4096,
            intermediate_size=11008,
            num_layers=32,
            num_heads=32,
            num_kv_heads=32,
            head_dim=128,
            rms_norm_eps=1e-5,
            max_positions=4096,
        ),
        image_token_id=32000,
        feature_layers=(23,),
        bos_token_id=1,
        pad_token_id=32001,
        eos_token_ids=(2,),
    ),
    "llava-v1.6-mistral-7b": LlavaConfig(
        model_type="llava_next",
        vision=_CLIP_L_336,
        decoder=DecoderConfig(
            family="mistral",
            vocab_size=32064,
            hidden_size=4096,
            intermediate_size=14336,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            rms_norm_eps=1e-5,
            rope=RopeConfig(theta=1e6),
            max_positions=32768,
        ),
        image_token_id=32000,
        feature_layers=(23,),
        grid_pinpoints=_PINPOINTS,
        bos_token_id=1,
        pad_token_id=32001,
        eos_token_ids=(2,),
    ),
    "llava-v1.6-34b": LlavaConfig(
        model_type="llava_next",
        vision=_CLIP_L_336,
        decoder=DecoderConfig(
            family="llama",
            vocab_size=64064,
            hidden_size=7168,
            intermediate_size=20480,
            num_layers=60,
            num_heads=56,
            num_kv_heads=8,
            head_dim=128,
            rms_norm_eps=1e-5,
            rope=RopeConfig(theta=5e6),
            max_positions=4096,
        ),
        image_token_id=64000,
        feature_layers=(23,),
        grid_pinpoints=_PINPOINTS,
        bos_token_id=1,
        pad_token_id=64001,
        eos_token_ids=(7,),
    ),
}
