"""A whole job in PyTorch: one person learned from a photo, then drawn. Two commands, as here.

    python -m benchmarks.torch_job learn ABOUT.json DEVICE eager|compiled MODE OUT STEPS BATCH
    python -m benchmarks.torch_job draw ABOUT.json DEVICE eager|compiled MODE OUT PICTURES STEPS

Tokenizer and face finding are this project's own, which use neither JAX nor PyTorch, so that both
sides spend the same on them.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.stack_torch import Careful, open_stack
from idea_jax.data import images, text
from idea_jax.data.tokenizer import Tokenizer, load_tokenizer, name_token_ids
from idea_jax.faces import finding, packs


def words(about: dict, encoder) -> tuple[Tokenizer, dict]:
    """The tokenizer, and the token ids that a job needs."""
    config = encoder.config
    lengths = config.vocab_size, config.max_position_embeddings
    placeholder = text.Placeholder("<person>", 2)
    tokenizer = load_tokenizer(Path(about["checkpoint"]) / "tokenizer", *lengths)
    tokenizer = tokenizer.with_placeholder(placeholder.token, placeholder.n)
    prompts = tokenizer([text.fill("a photo of {} person", placeholder), ""])
    ids = {
        "token_ids": tokenizer(text.training_prompts(placeholder)),
        "prompt_ids": prompts[0],
        "negative_ids": prompts[1],
    }
    return tokenizer, ids


@torch.no_grad()
def anchor_of(about: dict, encoder, tokenizer: Tokenizer) -> np.ndarray:
    """Cross Initialization: the encoder's output for the mean tokens of the names."""
    own = Path(about["checkpoint"]) / "names.txt"
    names = text.read_names(own) if own.is_file() else text.shipped_names()
    ids = torch.tensor(name_token_ids(tokenizer, names, 2), device=encoder.device)
    embeddings = encoder.embeddings
    present = (ids >= 0)[..., None]
    means = (embeddings.token_embedding(ids.clamp(min=0)) * present).sum(0) / present.sum(0)
    special = torch.tensor([tokenizer.bos, tokenizer.eos, tokenizer.pad], device=encoder.device)
    start, end, fill = embeddings.token_embedding(special)
    length = encoder.config.max_position_embeddings
    window = torch.cat([start[None], means, end[None], fill.expand(length - 4, -1)])[None]
    hidden = window + embeddings.position_embedding.weight[None]
    mask = torch.full((length, length), float("-inf"), device=encoder.device).triu(1)
    mask = mask.to(hidden.dtype)[None, None]
    encoded = encoder.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
    return encoder.final_layer_norm(encoded)[0, 1:3].float().cpu().numpy()


def learn(
    about: dict, device: str, kind: str, mode: str, out: Path, steps: str, batch: str
) -> None:
    """Learns the person and writes what was trained."""
    folder = Path(about["checkpoint"]) / "face"
    model = packs.find_recogniser(None, None, folder, accept_licence=False)
    finder = finding.open_finder(model, needs_detector=False)
    face = finder.look(images.PictureFile(Path(about["photo"]))).embed

    def inputs(encoder) -> dict:
        tokenizer, ids = words(about, encoder)
        start = anchor_of(about, encoder, tokenizer)
        return {
            **ids,
            "paper/trainable/pseudo_tokens": start,
            "paper/given/anchor": start,
            "paper/given/id_embed": np.asarray(face, np.float32),
            "draws/noise": np.zeros((0, 0, *about["latents"]), np.float32),
        }

    stack = open_stack(about, inputs, device, kind, mode)
    for _ in range(int(steps)):
        stack.step(stack.drawn(int(batch)))
    tensors = {"face": stack.face, "anchor": stack.anchor, **trained(stack)}
    out.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, out / "person.safetensors"
    )


def trained(stack: Careful) -> dict[str, torch.Tensor]:
    """All that is learned for one person, by name."""
    parts = {"tokens": stack.tokens}
    for name, module in (("enhancer", stack.enhancer), ("adapter", stack.adapter)):
        parts |= {f"{name}.{key}": value for key, value in module.named_parameters()}
    for index, delta in enumerate(stack.deltas):
        parts |= {f"kv.{index}.down": delta.down, f"kv.{index}.up": delta.up}
    return parts


def draw(
    about: dict, device: str, kind: str, mode: str, out: Path, pictures: str, steps: str
) -> None:
    """Draws the learned person and writes the pictures."""
    tensors = load_file(out / "person.safetensors")

    def inputs(encoder) -> dict:
        noise = torch.randn(int(pictures), *about["latents"]).numpy()
        return {
            **words(about, encoder)[1],
            "initial_noise": noise,
            "paper/trainable/pseudo_tokens": tensors["tokens"].numpy(),
            "paper/given/anchor": tensors["anchor"].numpy(),
            "paper/given/id_embed": tensors["face"].numpy(),
        }

    stack = open_stack(about, inputs, device, kind, mode)
    with torch.no_grad():
        for name, parameter in trained(stack).items():
            parameter.copy_(tensors[name])
    for index, pixels in enumerate(stack.pictures(int(pictures), int(steps))):
        Image.fromarray(pixels).save(out / f"{index:05d}.png")


COMMANDS = {"learn": learn, "draw": draw}

if __name__ == "__main__":
    command, about, device, kind, mode, out, *sizes = sys.argv[1:]
    COMMANDS[command](json.loads(Path(about).read_text()), device, kind, mode, Path(out), *sizes)
