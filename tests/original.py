"""The original layout of Stable Diffusion, written from weights in diffusers' layout.

It goes the other way than `idea_jax.models.original`, block by block as the original code builds
its networks, and shares nothing with it. `tests/test_original.py` has diffusers read the result.
"""

from pathlib import Path

import reference
import torch
from safetensors.torch import save_file

# As large as the rules of the original layout ask for: 32 groups, 8 heads or heads of 64 channels.
SIZES = {
    "sd1": (
        {
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 64,
            "sample_size": 64,
        },
        {
            "block_out_channels": (32, 32, 64),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
            "layers_per_block": 2,
            "sample_size": 256,
        },
        {
            "vocab_size": 600,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "hidden_act": "quick_gelu",
        },
    ),
    "sd2": (
        {
            "block_out_channels": (64, 128),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": (1, 2),
            "cross_attention_dim": 128,
            "sample_size": 64,
            "use_linear_projection": True,
        },
        {
            "block_out_channels": (32, 64),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "layers_per_block": 1,
            "sample_size": 128,
        },
        {
            "vocab_size": 600,
            "hidden_size": 128,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "hidden_act": "gelu",
        },
    ),
}

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def moved(state, source, target, names=None):
    """What is below `source`, under `target`; `names` renames what follows."""
    found = {}
    for key, value in state.items():
        if key.startswith(f"{source}."):
            rest = key.removeprefix(f"{source}.")
            for old, new in (names or {}).items():
                if rest.startswith(f"{old}."):
                    rest = f"{new}.{rest.removeprefix(f'{old}.')}"
                    break
            found[f"{target}.{rest}"] = value
    return found


def unet_tensors(state, unet):
    """The UNet's tensors, as its constructor appends blocks to three lists."""
    levels, layers = len(unet["block_out_channels"]), unet["layers_per_block"]
    out = moved(state, "time_embedding.linear_1", "time_embed.0")
    out |= moved(state, "time_embedding.linear_2", "time_embed.2")
    out |= moved(state, "add_embedding.linear_1", "label_emb.0.0")
    out |= moved(state, "add_embedding.linear_2", "label_emb.0.2")
    out |= moved(state, "conv_in", "input_blocks.0.0")
    out |= moved(state, "conv_norm_out", "out.0") | moved(state, "conv_out", "out.2")
    at = 1
    for level in range(levels):
        down = f"down_blocks.{level}"
        for j in range(layers):
            out |= moved(state, f"{down}.resnets.{j}", f"input_blocks.{at}.0", RESNET)
            out |= moved(state, f"{down}.attentions.{j}", f"input_blocks.{at}.1")
            at += 1
        if level < levels - 1:
            out |= moved(state, f"{down}.downsamplers.0.conv", f"input_blocks.{at}.0.op")
            at += 1
    out |= moved(state, "mid_block.resnets.0", "middle_block.0", RESNET)
    out |= moved(state, "mid_block.attentions.0", "middle_block.1")
    out |= moved(state, "mid_block.resnets.1", "middle_block.2", RESNET)
    at = 0
    for level in range(levels):
        up = f"up_blocks.{level}"
        crossed = unet["up_block_types"][level].startswith("CrossAttn")
        for j in range(layers + 1):
            out |= moved(state, f"{up}.resnets.{j}", f"output_blocks.{at}.0", RESNET)
            out |= moved(state, f"{up}.attentions.{j}", f"output_blocks.{at}.1")
            if j == layers and level < levels - 1:
                place = f"output_blocks.{at}.{1 + crossed}.conv"
                out |= moved(state, f"{up}.upsamplers.0.conv", place)
            at += 1
    return {f"model.diffusion_model.{key}": value for key, value in out.items()}


def vae_tensors(state, vae):
    """The autoencoder's tensors; its attention is made of 1x1 convolutions."""
    levels = len(vae["block_out_channels"])
    out = moved(state, "quant_conv", "quant_conv")
    out |= moved(state, "post_quant_conv", "post_quant_conv")
    short = {"conv_shortcut": "nin_shortcut"}
    for part, blocks, old, sampler in (
        ("encoder", "down_blocks", "down", "downsample"),
        ("decoder", "up_blocks", "up", "upsample"),
    ):
        out |= moved(state, f"{part}.conv_in", f"{part}.conv_in")
        out |= moved(state, f"{part}.conv_norm_out", f"{part}.norm_out")
        out |= moved(state, f"{part}.conv_out", f"{part}.conv_out")
        middle = f"{part}.mid_block"
        out |= moved(state, f"{middle}.resnets.0", f"{part}.mid.block_1", short)
        out |= moved(state, f"{middle}.resnets.1", f"{part}.mid.block_2", short)
        attention = moved(state, f"{middle}.attentions.0", f"{part}.mid.attn_1", ATTENTION)
        out |= {k: v if v.ndim < 2 else v[:, :, None, None] for k, v in attention.items()}
        for level in range(levels):
            own = level if part == "encoder" else levels - 1 - level
            target = f"{part}.{old}.{own}"
            for j in range(vae["layers_per_block"] + 1):
                source = f"{part}.{blocks}.{level}.resnets.{j}"
                out |= moved(state, source, f"{target}.block.{j}", short)
            source = f"{part}.{blocks}.{level}.{sampler}rs.0.conv"
            out |= moved(state, source, f"{target}.{sampler}.conv")
    return {f"first_stage_model.{key}": value for key, value in out.items()}


def text_tensors(state, kind):
    """The text encoder's: transformers' CLIP in SD 1.x, OpenCLIP with one more layer in SD 2.x; of
    kind "sdxl" those of its second one."""
    state = {key.removeprefix("text_model."): value for key, value in state.items()}
    if kind == "sd1":
        prefix = "cond_stage_model.transformer.text_model."
        count = state["embeddings.position_embedding.weight"].shape[0]
        ids = {"embeddings.position_ids": torch.arange(count)[None]}
        return {f"{prefix}{key}": value for key, value in (state | ids).items()}
    width = state["embeddings.token_embedding.weight"].shape[1]
    out = moved(state, "final_layer_norm", "ln_final")
    out["token_embedding.weight"] = state["embeddings.token_embedding.weight"]
    out["positional_embedding"] = state["embeddings.position_embedding.weight"]
    layers = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.layers."))
    last = f"transformer.resblocks.{layers}"
    for i in range(layers + 1):
        source = f"encoder.layers.{min(i, layers - 1)}"
        target = f"transformer.resblocks.{i}"
        out |= moved(state, f"{source}.layer_norm1", f"{target}.ln_1")
        out |= moved(state, f"{source}.layer_norm2", f"{target}.ln_2")
        out |= moved(state, f"{source}.mlp.fc1", f"{target}.mlp.c_fc")
        out |= moved(state, f"{source}.mlp.fc2", f"{target}.mlp.c_proj")
        out |= moved(state, f"{source}.self_attn.out_proj", f"{target}.attn.out_proj")
        for name in ("weight", "bias"):
            own = [state[f"{source}.self_attn.{x}_proj.{name}"] for x in "qkv"]
            out[f"{target}.attn.in_proj_{name}"] = torch.cat(own)
    out["text_projection"] = torch.full((width, width), 7.0)
    out["logit_scale"] = torch.tensor(4.6)
    if kind == "sdxl":  # which uses all layers, and the projection
        out = {k: v for k, v in out.items() if not k.startswith(f"{last}.")}
        out["text_projection"] = state["text_projection.weight"].T
        return {f"conditioner.embedders.1.model.{key}": value for key, value in out.items()}
    return {f"cond_stage_model.model.{key}": value for key, value in out.items()}


def tensors_of(models, kind):
    """All tensors of `reference.TorchModels` of a kind in `SIZES`, without what is not read."""
    unet, vae, _ = SIZES[kind]
    found = unet_tensors(models.unet.state_dict(), unet)
    found |= vae_tensors(models.vae.state_dict(), vae)
    return found | text_tensors(models.text.state_dict(), kind)


def clutter(tensors):
    """What real files hold beside: averages, the noise schedule, losses and counters."""
    first = next(key for key in tensors if key.startswith("model.diffusion_model.out."))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return {
        "model_ema." + first.removeprefix("model.").replace(".", ""): torch.ones(3),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(5),
        "betas": betas.float(),
        "alphas_cumprod": torch.cumprod(1 - betas, 0).float(),
        "sqrt_one_minus_alphas_cumprod": torch.ones(1000),
        "posterior_log_variance_clipped": torch.ones(1000),
        "lvlb_weights": torch.ones(1000),
        "first_stage_model.loss.logvar": torch.tensor(0.0),
        "first_stage_model.loss.discriminator.main.0.weight": torch.ones(2, 2),
        "global_step": torch.tensor(470000),
    }


def write(path: Path, kind: str):
    """Writes small random models into one file, and in diffusers' layout beside it.

    Returns the file, the folder, and the torch models.
    """
    folder = path.with_suffix("")
    models = reference.write_checkpoint(folder, kind, sizes=SIZES)
    tensors = tensors_of(models, kind)
    tensors |= clutter(tensors)
    tensors = {key: value.clone().contiguous() for key, value in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return path, folder, models
