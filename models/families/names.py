"""Names of tensors as transformers wrote them first.

It has written models of a tower, a projector and a decoder under several layouts of names. All of them are turned into
one, the oldest, which every version reads and which `save_params` writes:

    canonical                                    also seen
    language_model.model.norm.weight             model.language_model.norm.weight
    language_model.lm_head.weight                lm_head.weight
    vision_tower.vision_model.encoder. ...       vision_tower.encoder. ..., model.vision_tower. ...
    multi_modal_projector.linear_1.weight        model.multi_modal_projector.linear_1.weight
    image_newline                                model.image_newline
"""

import re


def oldest_name(name: str) -> str:
    """The canonical name of a tensor; others stay as they are."""
    name = re.sub(r"^model\.(?=language_model\.|vision_tower\.|multi_modal_projector\.|image_newline$)", "", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    name = re.sub(r"^language_model\.(?!model\.|lm_head\.)", "language_model.model.", name)
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def newest_module(name: str) -> str:
    """What transformers 5 calls the module, or the parameter, of a canonical name: adapters of PEFT are named so."""
    name = re.sub(r"^language_model\.lm_head", "lm_head", name)
    name = re.sub(r"^language_model\.model\.", "language_model.", name)
    name = re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)
    return re.sub(r"^(?=language_model\.|vision_tower\.|multi_modal_projector\.|image_newline$)", "model.", name)
