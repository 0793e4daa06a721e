"""How files of LoRA adapters name their tensors: PEFT's, diffusers' of every age, kohya's.

A key names the part of a pipeline (its network), a module of it, and the tensor's role: the factor `down` [rank, in, ...],
the factor `up` [out, rank, ...], or `alpha`. PEFT and diffusers join a module's names by dots. kohya joins them by
underscores, for Stable Diffusion XL in the names of its original code, so that only the network's own names tell them apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

DENOISERS = ("unet", "transformer")
PARTS = (*DENOISERS, "text_encoder", "text_encoder_2", "text_encoder_3")
KOHYA = {
    "lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}  # fmt: skip
ROLES = {
    ".lora_A.weight": "down", ".lora_B.weight": "up",  # PEFT, and diffusers with it
    ".lora_embedding_A": "down", ".lora_embedding_B": "up",
    ".lora.down.weight": "down", ".lora.up.weight": "up",  # diffusers before PEFT
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",  # of an attention's processor, older still
    ".lora_down.weight": "down", ".lora_up.weight": "up",  # kohya
    ".alpha": "alpha",
}  # fmt: skip
OTHERS = {  # what is refused: a piece of its keys, and what it is called
    "hada_": "LoHa", "lokr_": "LoKr", "oft_": "OFT", "boft_": "BOFT", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA",
    "lora_mid.": "LoCon's Tucker decomposition", ".diff": "a difference of full weights", ".w_norm": "a norm's difference",
    ".bias": "a bias",
}  # fmt: skip
RESIDUAL = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}  # fmt: skip
OUTER = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def split_part(key: str) -> tuple[str | None, str]:
    """Return the part of the pipeline that a key belongs to, or None where it names none, and the rest of the key.

    Args:
      key: of a file of diffusers or kohya.

    Example:
      >>> from rgdiff.runtime import lora_keys
      >>> lora_keys.split_part("unet.conv_in.lora_A.weight")
      ('unet', 'conv_in.lora_A.weight')
      >>> lora_keys.split_part("lora_te2_text_projection.alpha")
      ('text_encoder_2', 'text_projection.alpha')
    """
    if start := next((start for start in KOHYA if key.startswith(start)), None):
        return KOHYA[start], key.removeprefix(start)
    head, _, rest = key.partition(".")
    return (head, rest) if head in PARTS else (None, key)


def split_role(key: str) -> tuple[str, str]:
    """Return the module and the role of a tensor, `down`, `up` or `alpha`.

    Args:
      key: without the part.

    Raises:
      ValueError: for a tensor that is none of these; it says what kind of adapter has such tensors.

    Example:
      >>> from rgdiff.runtime import lora_keys
      >>> lora_keys.split_role("attn1.processor.to_out_lora.down.weight")
      ('attn1.to_out.0', 'down')
    """
    ending = next((ending for ending in ROLES if key.endswith(ending)), None)
    if ending is None:
        kind = next((kind for piece, kind in OTHERS.items() if piece in key), None)
        raise ValueError(
            f"{key!r} is no low-rank factor{f' but {kind}' if kind else ''}; an adapter here holds nothing else"
        )
    module = key.removesuffix(ending).replace(".processor.", ".")
    if ending[0] == "_" and module.endswith(".to_out"):
        module += ".0"
    return module, ROLES[ending]


def kohya_names(modules: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Return a network's leaves by kohya's names of their modules.

    Args:
      modules: name of a module, dots included -> its leaves.

    Example:
      >>> from rgdiff.runtime import lora_keys
      >>> lora_keys.kohya_names({"down_blocks.0.resnets.0.conv1": ["a"]})
      {'down_blocks_0_resnets_0_conv1': ['a'], 'input_blocks_1_0_in_layers_2': ['a']}
    """
    original, out = original_names(modules), {}
    for module, leaves in modules.items():
        for spelled in dict.fromkeys((module, original.get(module, module))):
            out.setdefault(spelled.replace(".", "_"), []).extend(leaves)
    return out


def original_names(modules: Iterable[str]) -> dict[str, str]:
    """Return the names that a UNet's modules have in the original code of Stable Diffusion, of those that have one.

    Its blocks are numbered through: input block 0 is conv_in, then come each stage's layers and its downsampler.

    Args:
      modules: names of a UNet of diffusers, all of them: they tell the number of layers a stage.

    Example:
      >>> from rgdiff.runtime import lora_keys
      >>> names = ("down_blocks.0.resnets.0.conv1", "down_blocks.1.attentions.0.proj_in", "mid_block.resnets.1.conv2")
      >>> list(lora_keys.original_names(names).values())
      ['input_blocks.1.0.in_layers.2', 'input_blocks.3.1.proj_in', 'middle_block.2.out_layers.3']
    """
    modules = list(modules)
    found = [re.match(r"(?:(down|up)_blocks\.(\d+)|(mid)_block)\.(\w+)\.(\d+)\.(.+)", module) for module in modules]
    split = {module: match.groups() for module, match in zip(modules, found, strict=True) if match}
    layers = 1 + max((int(layer) for way, _, _, kind, layer, _ in split.values() if way == "down" and kind == "resnets"), default=0)  # fmt: skip
    attends = {block for way, block, _, kind, _, _ in split.values() if way == "up" and kind == "attentions"}
    out = {module: OUTER[module] for module in modules if module in OUTER}
    for module, (way, block, mid, kind, layer, rest) in split.items():
        if kind not in ("resnets", "attentions", "downsamplers", "upsamplers"):
            continue
        attention = kind == "attentions"
        rest = rest if kind != "resnets" else RESIDUAL.get(rest, rest)
        if mid:
            out[module] = f"middle_block.{1 if attention else 2 * int(layer)}.{rest}"
        elif way == "down":
            place = 1 + int(block) * (layers + 1) + (layers if kind == "downsamplers" else int(layer))
            out[module] = f"input_blocks.{place}.{int(attention)}.{'op' if kind == 'downsamplers' else rest}"
        else:
            last = kind == "upsamplers"
            place = int(block) * (layers + 1) + (layers if last else int(layer))
            out[module] = f"output_blocks.{place}.{1 + (block in attends) if last else int(attention)}.{rest}"
    return out
