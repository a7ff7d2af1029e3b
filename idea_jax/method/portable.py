"""What acts of a person when they are drawn, as plain arrays in torch's layout: for other programs.

A drawing needs three things of a person: token embeddings, deltas of the cross-attention's key and
value weights, and what the ID-Adapter adds to the text condition. Nothing here needs Flax, an
ID-Enhancer or a face embedding to be used.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from idea_jax import pytrees
from idea_jax.method import condition
from idea_jax.method.modules import IDEnhancer

# Deltas by the name that diffusers gives the module: down float32[r, D] and up float32[inner, r];
# the weight [inner, D] grows by `up @ down`.
Deltas = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class PortableAdapter:
    """An ID-Adapter: `contribution` of `idea_jax.diffusers` says how it is used.

    Attributes:
      face: float32[N, D], what is attended to beside the text.
      scale: beta * tanh(gamma).
      attention: weights float32[D, D] as (outputs, inputs) and biases float32[D], by the names
        `to_q.weight`, `to_q.bias` and so on of `to_q`, `to_k`, `to_v`, `to_out`.
    """

    face: np.ndarray
    scale: float
    attention: dict[str, np.ndarray]


@dataclass(frozen=True)
class Portable:
    """What draws a person.

    Attributes:
      tokens: float32[N, D].
      own: deltas of the person's own; empty for none.
      shared: deltas of a shared ID-Enhancer; empty for none.
      adapter: None where no ID-Adapter draws.
      shares_adapter: whether `scale` and `attention` of it are a shared ID-Enhancer's.
    """

    tokens: np.ndarray
    own: Deltas = field(default_factory=dict)
    shared: Deltas = field(default_factory=dict)
    adapter: PortableAdapter | None = None
    shares_adapter: bool = False


def portable(
    method: condition.Method,
    trainable: condition.Trainable,
    given: condition.Given,
    shared: Mapping | None = None,
) -> Portable:
    """Returns what acts of a person.

    Args:
      trainable, given: of an identity.
      shared: "adapter" and "kv" of the shared tree that the person began with; None for a person
        who needs none.
    """
    tokens = np.asarray(trainable["pseudo_tokens"], np.float32)
    if not method.acts_at_sampling:
        return Portable(tokens)
    own = deltas(trainable["kv"]) if method.kv != "none" else {}
    ours = deltas(shared["kv"]) if method.shared_kv else {}
    adapter = None
    if method.adapter:
        enhanced = np.asarray(enhanced_of(method, trainable, given), np.float32)
        network = shared["adapter"] if method.shared_adapter else trainable["adapter"]
        adapter = plain_adapter(network, enhanced, method.beta)
    return Portable(tokens, own, ours, adapter, method.shared_adapter)


def enhanced_of(
    method: condition.Method, trainable: condition.Trainable, given: condition.Given
) -> np.ndarray:
    """The ID-Adapter's input, float32[N, 2D]."""
    if method.enhanced:
        return trainable["enhanced"]
    enhancer = trainable["enhancer"] if method.train_enhancer else given["enhancer"]
    D = np.shape(trainable["pseudo_tokens"])[1]
    return IDEnhancer(D).apply({"params": enhancer}, given["id_embed"], given["anchor"])


def plain_adapter(params: Mapping, enhanced: np.ndarray, beta: float) -> PortableAdapter:
    """The parameters of an `IDAdapter` that sees float32[N, 2D], without its first layer, which
    sees nothing else."""
    project = params["project"]
    kernel, bias = (np.asarray(project[name], np.float32) for name in ("kernel", "bias"))
    attention = {}
    for name, layer in params["attention"].items():
        attention[f"{name}.weight"] = np.asarray(layer["kernel"], np.float32).T
        attention[f"{name}.bias"] = np.asarray(layer["bias"], np.float32)
    scale = beta * np.tanh(np.float64(params["gamma"]))
    return PortableAdapter(enhanced @ kernel + bias, float(scale), attention)


def deltas(kv: dict) -> Deltas:
    """K/V deltas, low-rank or full, as pairs of thin matrices. A full one has an identity matrix as
    the other factor, so that nothing of it is lost."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for path, leaf in pytrees.flatten(kv).items():
        layer, part = re.fullmatch(r"(.+?/to_[kv])(?:/(down|up))?", path).groups()
        found.setdefault(module_name(layer), {})[part or "full"] = np.asarray(leaf, np.float32)
    pairs = {}
    for name, parts in found.items():
        if "full" not in parts:
            pairs[name] = parts["down"].T, parts["up"].T
            continue
        D, inner = parts["full"].shape
        if inner <= D:
            pairs[name] = parts["full"].T, np.eye(inner, dtype=np.float32)
        else:
            pairs[name] = np.eye(D, dtype=np.float32), parts["full"].T
    return pairs


def module_name(path: str) -> str:
    """`down_blocks_0/attentions_1/transformer_blocks_0/to_k` as diffusers names that module."""
    *blocks, layer = path.split("/")
    return ".".join([*(re.sub(r"_(\d+)$", r".\1", block) for block in blocks), "attn2", layer])
