"""Key tables between diffusers' weight files and the parameter trees here, in both directions.

A table is a tuple of rules (source key, target path, transform). `#` stands for a number, the same
ones in the same order on both sides. The first part of a target path is the tree it belongs to:
`text`, `text_2`, `unet`, `cross_kv` or `vae`. Loading is strict: whatever does not fit one to
one is an error that lists everything that does not fit.
"""

import logging
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from idea_jax.models.tensor_files import FLOAT_TYPES, Tensors, WeightsError
from idea_jax.pytrees import flatten, unflatten

log = logging.getLogger(__name__)

READERS = min(8, os.cpu_count() or 1)  # threads
LISTED_PER_KIND = 20  # an error that lists thousands of keys hides the interesting ones


class Transform(NamedTuple):
    """Turns a source tensor into a parameter; `layouts` are its inverses, the one written first."""

    load: Callable[[np.ndarray], np.ndarray]
    layouts: tuple[Callable[[np.ndarray], np.ndarray], ...]


def _as_is(x: np.ndarray) -> np.ndarray:
    return x


def _transposed(x: np.ndarray) -> np.ndarray:
    return x.T


def _as_conv1x1(x: np.ndarray) -> np.ndarray:
    return x.T[:, :, None, None]


TRANSFORMS = {
    "as_is": Transform(_as_is, (_as_is,)),
    # torch's Linear [out, in] and Flax's Dense [in, out]
    "linear": Transform(_transposed, (_transposed,)),
    # torch's OIHW and Flax's HWIO
    "conv": Transform(lambda x: x.transpose(2, 3, 1, 0), (lambda x: x.transpose(3, 2, 0, 1),)),
    # a convolution of size 1x1 that is a Dense here
    "conv1x1": Transform(lambda x: x[:, :, 0, 0].T, (_as_conv1x1,)),
    "linear_or_conv1x1": Transform(lambda x: x.reshape(x.shape[:2]).T, (_transposed, _as_conv1x1)),
}


class Rule(NamedTuple):
    """One row of a table; a `legacy` row is an older name, read but never written."""

    source: str
    target: str
    transform: str
    legacy: bool = False


class Table(NamedTuple):
    """All rules of one weight file, and the keys of older files that hold no weight.

    `layers` begins the target of a layer of a network whose last ones may be left out (clip skip).
    """

    rules: tuple[Rule, ...]
    skipped: tuple[str, ...] = ()
    layers: str | None = None


def _layer(source: str, target: str, transform: str, bias: bool = True) -> list[Rule]:
    rules = [Rule(f"{source}.weight", f"{target}/kernel", transform)]
    return [*rules, Rule(f"{source}.bias", f"{target}/bias", "as_is")] if bias else rules


def _norm(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.weight", f"{target}/scale", "as_is"),
        Rule(f"{source}.bias", f"{target}/bias", "as_is"),
    ]


def _resnet(source: str, target: str, time: bool) -> list[Rule]:
    rules = [
        *_norm(f"{source}.norm1", f"{target}/norm1"),
        *_layer(f"{source}.conv1", f"{target}/conv1", "conv"),
        *_norm(f"{source}.norm2", f"{target}/norm2"),
        *_layer(f"{source}.conv2", f"{target}/conv2", "conv"),
        *_layer(f"{source}.conv_shortcut", f"{target}/conv_shortcut", "conv1x1"),
    ]
    if time:
        rules += _layer(f"{source}.time_emb_proj", f"{target}/time_emb_proj", "linear")
    return rules


def _transformer(source: str, block: str, projection: str) -> list[Rule]:
    target = f"unet/{block}/attentions_#"
    inner, inner_target = f"{source}.transformer_blocks.#", f"{target}/transformer_blocks_#"
    rules = [
        *_norm(f"{source}.norm", f"{target}/norm"),
        *_layer(f"{source}.proj_in", f"{target}/proj_in", projection),
        *_layer(f"{source}.proj_out", f"{target}/proj_out", projection),
        *_layer(f"{inner}.ff.net.0.proj", f"{inner_target}/ff/net_0/proj", "linear"),
        *_layer(f"{inner}.ff.net.2", f"{inner_target}/ff/net_2", "linear"),
    ]
    for n in (1, 2, 3):
        rules += _norm(f"{inner}.norm{n}", f"{inner_target}/norm{n}")
    for attn, layer in (("attn1", "to_q"), ("attn1", "to_k"), ("attn1", "to_v"), ("attn2", "to_q")):
        rules += _layer(
            f"{inner}.{attn}.{layer}", f"{inner_target}/{attn}/{layer}", "linear", False
        )
    for attn in ("attn1", "attn2"):
        rules += _layer(f"{inner}.{attn}.to_out.0", f"{inner_target}/{attn}/to_out_0", "linear")
    cross = f"cross_kv/{block}/attentions_#/transformer_blocks_#"
    for layer in ("to_k", "to_v"):
        rules.append(Rule(f"{inner}.attn2.{layer}.weight", f"{cross}/{layer}", "linear"))
    return rules


def unet_table(use_linear_projection: bool) -> Table:
    """The table of a UNet; SD 1.x has 1x1 convolutions around its transformers, others linears.

    `add_embedding` is SDXL's alone.
    """
    rules = [
        *_layer("time_embedding.linear_#", "unet/time_embedding/linear_#", "linear"),
        *_layer("add_embedding.linear_#", "unet/add_embedding/linear_#", "linear"),
        *_layer("conv_in", "unet/conv_in", "conv"),
        *_norm("conv_norm_out", "unet/conv_norm_out"),
        *_layer("conv_out", "unet/conv_out", "conv"),
    ]
    projection = "linear" if use_linear_projection else "conv1x1"
    for source, block, sampler in (
        ("down_blocks.#", "down_blocks_#", "downsamplers"),
        ("mid_block", "mid_block", None),
        ("up_blocks.#", "up_blocks_#", "upsamplers"),
    ):
        rules += _resnet(f"{source}.resnets.#", f"unet/{block}/resnets_#", time=True)
        rules += _transformer(f"{source}.attentions.#", block, projection)
        if sampler:
            conv = f"unet/{block}/{sampler}_#/conv"
            rules += _layer(f"{source}.{sampler}.#.conv", conv, "conv")
    return Table(tuple(rules))


def vae_table() -> Table:
    """The table of the autoencoder, with the attention names of files before diffusers 0.18."""
    rules = [
        *_layer("quant_conv", "vae/quant_conv", "conv1x1"),
        *_layer("post_quant_conv", "vae/post_quant_conv", "conv1x1"),
    ]
    for part, blocks, sampler in (
        ("encoder", "down_blocks", "downsamplers"),
        ("decoder", "up_blocks", "upsamplers"),
    ):
        target = f"vae/{part}"
        rules += _layer(f"{part}.conv_in", f"{target}/conv_in", "conv")
        rules += _norm(f"{part}.conv_norm_out", f"{target}/conv_norm_out")
        rules += _layer(f"{part}.conv_out", f"{target}/conv_out", "conv")
        for source, block in ((f"{blocks}.#", f"{blocks}_#"), ("mid_block", "mid_block")):
            resnet = f"{target}/{block}/resnets_#"
            rules += _resnet(f"{part}.{source}.resnets.#", resnet, time=False)
        conv = f"{target}/{blocks}_#/{sampler}_#/conv"
        rules += _layer(f"{part}.{blocks}.#.{sampler}.#.conv", conv, "conv")
        source, target = f"{part}.mid_block.attentions.#", f"{target}/mid_block/attentions_#"
        rules += _norm(f"{source}.group_norm", f"{target}/group_norm")
        for name, layer, old in (
            ("to_q", "to_q", "query"),
            ("to_k", "to_k", "key"),
            ("to_v", "to_v", "value"),
            ("to_out.0", "to_out_0", "proj_attn"),
        ):
            rules += _layer(f"{source}.{name}", f"{target}/{layer}", "linear")
            older = _layer(f"{source}.{old}", f"{target}/{layer}", "linear_or_conv1x1")
            rules += [rule._replace(legacy=True) for rule in older]
    return Table(tuple(rules))


def text_table(tree: str = "text") -> Table:
    """The table of a text encoder; the second one of SDXL, `text_2`, has a projection.

    Stable Diffusion's own files and transformers 4 prefix every key with `text_model.`, which is
    what is written; transformers 5 saves without the prefix. Older files hold the constant
    `position_ids`.
    """
    rules = [
        Rule(f"embeddings.{name}.weight", f"{tree}/embeddings/{name}/embedding", "as_is")
        for name in ("token_embedding", "position_embedding")
    ]
    rules += _norm("final_layer_norm", f"{tree}/final_layer_norm")
    rules += _clip_layers(tree)
    prefixed = [rule._replace(source=f"text_model.{rule.source}") for rule in rules]
    unprefixed = [rule._replace(legacy=True) for rule in rules]
    skipped = ("text_model.embeddings.position_ids", "embeddings.position_ids")
    projection = _layer("text_projection", f"{tree}/text_projection", "linear", bias=False)
    rules = [*prefixed, *unprefixed, *(projection if tree == "text_2" else ())]
    return Table(tuple(rules), skipped, f"{tree}/encoder/layers_")


def vision_table() -> Table:
    """The table of a CLIP image encoder with its projection."""
    embeddings = "vision_model.embeddings"
    rules = [
        Rule(f"{embeddings}.class_embedding", "vision/class_embedding", "as_is"),
        Rule(f"{embeddings}.patch_embedding.weight", "vision/patch_embedding/kernel", "conv"),
        Rule(
            f"{embeddings}.position_embedding.weight",
            "vision/position_embedding/embedding",
            "as_is",
        ),
        *_norm("vision_model.pre_layrnorm", "vision/pre_layernorm"),  # so spelled in the files
        *_norm("vision_model.post_layernorm", "vision/post_layernorm"),
        *_layer("visual_projection", "vision/visual_projection", "linear", False),
    ]
    rules += [r._replace(source=f"vision_model.{r.source}") for r in _clip_layers("vision")]
    return Table(tuple(rules), (f"{embeddings}.position_ids",))


def _clip_layers(tree: str) -> list[Rule]:
    source, target, rules = "encoder.layers.#", f"{tree}/encoder/layers_#", []
    for layer in ("q_proj", "k_proj", "v_proj", "out_proj"):
        rules += _layer(f"{source}.self_attn.{layer}", f"{target}/self_attn/{layer}", "linear")
    for layer in ("fc1", "fc2"):
        rules += _layer(f"{source}.mlp.{layer}", f"{target}/mlp/{layer}", "linear")
    for layer in ("layer_norm1", "layer_norm2"):
        rules += _norm(f"{source}.{layer}", f"{target}/{layer}")
    return rules


def _pattern(template: str) -> re.Pattern:
    return re.compile(re.escape(template).replace(r"\#", r"(\d+)"))


def _fill(template: str, numbers: tuple[str, ...]) -> str:
    parts = template.split("#")
    return parts[0] + "".join(n + part for n, part in zip(numbers, parts[1:], strict=True))


def _raise_if_any(problems: dict[str, list[str]], where: str) -> None:
    found = {kind: lines for kind, lines in problems.items() if lines}
    if not found:
        return
    text = f"{where}: the weights do not fit the network that their config describes"
    for kind, lines in found.items():
        text += f"\n{len(lines)} {kind}:" + "".join(f"\n  {x}" for x in lines[:LISTED_PER_KIND])
        if len(lines) > LISTED_PER_KIND:
            text += f"\n  ... and {len(lines) - LISTED_PER_KIND} more"
    raise WeightsError(text)


def match_keys(
    table: Table, headers: dict, targets: dict, where: str
) -> dict[str, tuple[str, str]]:
    """Returns {source key: (target path, transform)}; headers are {source key: (shape, dtype)}."""
    patterns = [(_pattern(rule.source), rule) for rule in table.rules]
    problems: dict[str, list[str]] = defaultdict(list)
    sources: dict[str, list[str]] = defaultdict(list)
    plan, cut, spare = {}, set(), []
    for key in sorted(set(headers) - set(table.skipped)):
        shape, dtype = headers[key]
        matches = [(m, rule) for pattern, rule in patterns if (m := pattern.fullmatch(key))]
        if len(matches) > 1:
            rules = ", ".join(rule.source for _, rule in matches)
            problems["keys matched by two rules"].append(f"{key} ({rules})")
            continue
        target = _fill(matches[0][1].target, matches[0][0].groups()) if matches else None
        if target not in targets and table.layers and target and target.startswith(table.layers):
            layer = target.removeprefix(table.layers).partition("/")[0]
            if not any(path.startswith(f"{table.layers}{layer}/") for path in targets):
                cut.add(int(layer))
                continue
        if not matches and math.prod(shape) <= 1:  # a counter, such as the decay of an average
            spare.append(key)
            continue
        if target not in targets:
            problems["keys unknown to the network"].append(f"{key} {list(shape)}")
            continue
        sources[target].append(key)
        transform = matches[0][1].transform
        empty = np.broadcast_to(np.float32(0), targets[target].shape)  # a shape without memory
        expected = [list(layout(empty).shape) for layout in TRANSFORMS[transform].layouts]
        if list(shape) not in expected:
            wanted = " or ".join(str(item) for item in expected)
            problems["keys of another shape"].append(f"{key}: {list(shape)}, expected {wanted}")
        elif dtype not in FLOAT_TYPES:
            kinds = ", ".join(FLOAT_TYPES)
            problems["keys of another type"].append(f"{key}: {dtype}, expected one of {kinds}")
        plan[key] = (target, transform)
    for target, keys in sources.items():
        if len(keys) > 1:
            problems["parameters given twice"].append(f"{target} by {' and '.join(keys)}")
    missing = sorted(set(targets) - set(sources))
    if missing:
        names = source_keys(table, missing)
        problems["missing keys"] += [
            f"{names[path]} (parameter {path} {list(targets[path].shape)})" for path in missing
        ]
    _raise_if_any(problems, where)
    if cut:
        log.warning(
            "%s: layers %d to %d are left out (clip skip)",
            where,
            min(cut),
            max(cut),
        )
    if spare:
        log.warning("%s: numbers without a meaning here: %s", where, ", ".join(spare[:5]))
    return plan


def source_keys(table: Table, paths: list[str]) -> dict[str, str]:
    """The key under which each parameter is written; a path without exactly one raises."""
    patterns = [(_pattern(rule.target), rule) for rule in table.rules if not rule.legacy]
    names, problems = {}, []
    for path in paths:
        matches = [(m, rule) for pattern, rule in patterns if (m := pattern.fullmatch(path))]
        if len(matches) == 1:
            names[path] = _fill(matches[0][1].source, matches[0][0].groups())
        else:
            problems.append(path)
    _raise_if_any({"parameters without exactly one rule": problems}, "key table")
    return names


def to_params(
    table: Table,
    tensors: Mapping[str, np.ndarray],
    targets: dict,
    where: str,
    dtype: jnp.dtype = jnp.float32,
) -> dict:
    """Returns the parameter trees of `targets`, filled from `tensors` and cast to `dtype`.

    `targets` is `{"unet": tree of shapes, ...}`. Tensors are read, cast and sent to the device by a
    few threads, so that few of them exist twice at a time. Raises: WeightsError listing every
    key that does not fit, and naming `where`.
    """
    headers = tensors.headers if isinstance(tensors, Tensors) else _headers(tensors)
    plan = match_keys(table, headers, flatten(targets), where)

    device = jax.config.jax_default_device  # a thread of its own does not know the caller's

    def read(item):
        key, (target, transform) = item
        # A copy that nobody else has: JAX may keep its memory. (jnp.array would compile a program
        # for each shape to copy it once more, which took most of the time of loading the mini.)
        leaf = np.array(TRANSFORMS[transform].load(tensors[key]), dtype, order="C")
        with jax.default_device(device):
            return target, jax.device_put(leaf)

    # Reading, transposing and casting all leave Python's lock to others.
    with ThreadPoolExecutor(READERS) as readers:
        return unflatten(dict(readers.map(read, plan.items())))


def to_tensors(table: Table, params: dict, dtype: np.dtype = np.float32) -> dict[str, np.ndarray]:
    """The inverse of `to_params`: source key -> contiguous array of `dtype`, in torch's layout."""
    flat = flatten(params)
    names = source_keys(table, list(flat))
    by_target = [(_pattern(rule.target), rule) for rule in table.rules if not rule.legacy]

    def tensor_of(path):
        transform = next(rule.transform for pattern, rule in by_target if pattern.fullmatch(path))
        tensor = TRANSFORMS[transform].layouts[0](np.asarray(jax.device_get(flat[path])))
        return np.ascontiguousarray(tensor.astype(dtype))

    with ThreadPoolExecutor() as pool:
        return dict(zip((names[path] for path in flat), pool.map(tensor_of, flat), strict=True))


def _headers(tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[tuple[int, ...], str]]:
    kinds = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    return {k: (v.shape, kinds.get(v.dtype.name, v.dtype.name)) for k, v in tensors.items()}
