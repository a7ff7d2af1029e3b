"""This project, as a stack that the benchmark compares and times.

python -m benchmarks.stack_jax FOLDER COMPUTE_DTYPE
"""

import dataclasses
import functools
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import profiling, settings, worker, workloads
from idea_jax import costs, pytrees
from idea_jax.data import images
from idea_jax.data.tokenizer import Tokens
from idea_jax.models import flash, sd
from idea_jax.runtime import devices
from idea_jax.sampling import engine, programs
from idea_jax.training.program import Program, place_frozen, step_people
from idea_jax.training.step import (
    Metrics,
    Photos,
    draw_batch,
    init_state,
    make_optimizer,
    train_step,
    training_loss,
)

# What a stack is asked for.
CALLS = "train_outputs sample_outputs train_time sample_time ablated_time ceiling device".split()
CALLS += "convolutions flops memory release kernels".split()


class JaxStack:
    """The loaded model and the inputs; every public method answers one kind of request."""

    def __init__(self, folder: Path, compute_dtype: str):
        self.folder = folder
        self.about = settings.read(folder)
        self.inputs = dict(np.load(folder / "inputs.npz"))
        checkpoint = Path(self.about["checkpoint"])
        devices.use_cores(checkpoint)
        devices.check_backend()
        model, self.frozen = sd.load(checkpoint, compute_dtype=compute_dtype)
        attention = flash.resolve("auto", jax.local_devices()[0], compute_dtype)
        self.model = dataclasses.replace(model, attention=attention)
        mean, logvar = jax.jit(sd.encode_image, static_argnums=0)(
            self.model, self.frozen, self.pixels()
        )
        token_ids = jnp.asarray(self.inputs["token_ids"])
        self.photos = Photos(mean[None], logvar[None], jnp.int32(1), token_ids)
        method, _, state = self.person("paper")
        # On the host, as it comes from an identity file.
        self.identity = method, jax.device_get(state.trainable), jax.device_get(state.given)
        jax.block_until_ready((self.frozen, self.photos))
        self.compiled, self.placed = {}, {}

    # What is compared

    def train_outputs(self, profile: str, batch: int, room: int) -> str:
        """Losses and pseudo tokens of a few steps, as a file; the others are given their draws."""
        training = self.training(profile, batch, room)
        training.restart()
        frozen, times = training.weights(), range(settings.COMPARED_STEPS)
        losses = [float(training.take(1, frozen).loss[0, 0]) for _ in times]
        tokens = np.asarray(training.states.trainable["pseudo_tokens"][0])
        return self.save(f"jax-{profile}", losses=losses, tokens=tokens)

    def sample_outputs(self) -> str:
        """Pictures of a few steps, as a file."""
        return self.save("jax-pictures", pictures=self.draw(*settings.COMPARED_SAMPLING))

    # What is timed

    def train_time(
        self,
        profile: str,
        batch: int,
        steps: int,
        room: int,
        people: int = 1,
        changes: dict | None = None,
    ) -> float:
        """Seconds of a block of training steps; what they draw is drawn on the device.

        Args:
          steps: a multiple of `room`.
          room: steps of one call.
          people: trained at once.
          changes: of the model's settings, to take a measure back.
        """
        assert steps % room == 0, f"expected a multiple of {room} steps, got {steps}"
        training = self.training(profile, batch, room, people, tuple((changes or {}).items()))
        frozen = training.weights()  # in float32 they exist only while they are measured
        jax.block_until_ready((frozen, training.states))
        started = time.perf_counter()
        for _ in range(steps // room):
            metrics = training.take(room, frozen)
        jax.block_until_ready((training.states, metrics))
        return time.perf_counter() - started

    def sample_time(self, pictures: int, steps: int) -> float:
        """Seconds from the prompt's tokens to pictures on the host."""
        started = time.perf_counter()
        self.draw(pictures, steps)
        return time.perf_counter() - started

    def ablated_time(self, without: str, batch: int, steps: int) -> float:
        """Seconds of a block of steps, each a call, with one of the measures taken back.

        Args:
          without: "moments" (the VAE encodes in every step), "trainables" (the gradient of the
            whole UNet is taken and clipped with the rest, as a masked optimiser does), "calls" or
            "cores": nothing but that each step is a call of its own, on one device.
        """
        kind = (without, batch)
        if kind not in self.compiled:
            method, optimizer, state = self.person("paper")
            make = {
                "calls": self.plain_step,
                "cores": self.plain_step,
                "moments": self.encoding_step,
                "trainables": self.whole_gradient_step,
            }[without]
            run = jax.jit(make(method, optimizer, batch), donate_argnums=1)
            self.compiled[kind] = [run, state]
        return self.block(kind, steps, self.frozen, jax.random.key(0))

    def block(self, kind: tuple, calls: int, frozen: sd.Frozen, key: jax.Array) -> float:
        """Seconds of some calls of a compiled step, which keeps its state from block to block."""
        run, state = self.compiled[kind]
        jax.block_until_ready((frozen, key))
        started = time.perf_counter()
        for _ in range(calls):
            state, loss = run(frozen, state, key)
        jax.block_until_ready((state, loss))
        seconds = time.perf_counter() - started
        self.compiled[kind][1] = state
        return seconds

    def device(self) -> dict[str, str]:
        """What is computed on."""
        (one, *_) = jax.devices()
        return {"platform": one.platform, "kind": one.device_kind}

    def ceiling(self, size: int) -> float:
        """FLOP/s of square products in the compute dtype, one on each device, the best of ten."""
        count, kind = len(jax.devices()), ("ceiling", size)
        if kind not in self.compiled:
            mesh = Mesh(np.array(jax.devices()), ("products",), axis_types=(AxisType.Auto,))
            each = P("products")
            # Random, since products of equal numbers can run faster than those of real ones.
            draw = functools.partial(jax.random.normal, shape=(count * size, size))
            draw = functools.partial(draw, dtype=self.model.dtype)
            product = jax.shard_map(lambda a: a @ a, mesh=mesh, in_specs=each, out_specs=each)
            spread = NamedSharding(mesh, each)
            self.compiled[kind] = jax.jit(draw, out_shardings=spread), jax.jit(product)
        draw, product = self.compiled[kind]
        return count * 2 * size**3 / seconds_of(product, draw(jax.random.key(0)))

    def convolutions(self, batch: int) -> list[dict]:
        """Each distinct convolution of the UNet alone, in both layouts, slowest first.

        The networks are NHWC throughout; a kind that is much faster in NCHW, or far from the
        others' FLOP/s, is one for which the compiler has picked a bad algorithm.
        """
        side, channels = self.model.unet.sample_size, self.model.unet.in_channels
        rows = jax.tree.map(
            lambda kernel: jax.ShapeDtypeStruct((batch, 1, kernel.shape[1]), kernel.dtype),
            self.frozen.cross_kv,
        )
        jaxpr = jax.make_jaxpr(functools.partial(sd.predict, self.model))(
            self.frozen,
            jax.ShapeDtypeStruct((batch, side, side, channels), jnp.float32),
            jax.ShapeDtypeStruct((), jnp.int32),
            rows,
        )
        found = Counter(costs.convolutions(jaxpr.jaxpr))
        timed = []
        for (image, kernel, strides, padding), times in found.items():
            x = jax.random.normal(jax.random.key(0), image, self.model.dtype)
            w = jax.random.normal(jax.random.key(1), kernel, self.model.dtype)
            seconds = {
                layout: seconds_of(convolve(layout, strides, padding), *arrange(layout, x, w))
                for layout in ("NHWC", "NCHW")
            }
            timed.append({"image": image, "kernel": kernel, "times": times, **seconds})
        return sorted(timed, key=lambda one: -one["times"] * one["NHWC"])

    # What is counted

    def flops(self, batch: int, pictures: int, steps: int) -> dict[str, float]:
        """FLOPs that one training step and one call of the sampler need; nothing is run."""
        # Kernels of attention compute some of it again; what that takes is not needed.
        model = dataclasses.replace(self.model, attention="xla")
        method, optimizer, state = self.person("paper")
        step = functools.partial(train_step, model, method, optimizer)
        draw = functools.partial(draw_batch, model, size=batch)
        key = jax.eval_shape(lambda: jax.random.key(0))
        drawn = jax.eval_shape(draw, self.photos, key, jax.ShapeDtypeStruct((), jnp.int32))

        def draw_pictures():
            indices = jnp.arange(pictures, dtype=jnp.int32)
            about = jnp.uint32(0), indices, jnp.float32(settings.GUIDANCE), self.sampling(steps)
            return programs.draw(model, self.frozen, self.keys_values(self.frozen), *about)

        return {
            "train_step": costs.needed(step, self.frozen, state, drawn),
            "sampling": costs.needed(draw_pictures),
        }

    def memory(self, batch: int, room: int) -> int:
        """Bytes of training: on a device those that the program of a step is given and plans for
        itself, on a CPU the peak of this process so far."""
        if jax.default_backend() != "cpu":
            return self.training("paper", batch, room).device_bytes()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def release(self) -> None:
        """JAX frees device memory by itself."""

    def kernels(self, **sizes) -> list[list]:
        """The ten operations that take most of a block of steps: [name, share of all].

        Args:
          sizes: as of `train_time`.
        """
        self.train_time(**sizes)
        return profiling.top_ten(profiling.record(lambda: self.train_time(**sizes)))

    # Parts

    def training(
        self, profile: str, batch: int, room: int, people: int = 1, changes: tuple = ()
    ) -> "CompiledTraining":
        """The steps of a profile, compiled at the first call."""
        kind = ("training", profile, batch, room, people, changes)
        if kind not in self.compiled:
            self.compiled[kind] = CompiledTraining(
                self, profile, batch, room, people, dict(changes)
            )
        return self.compiled[kind]

    def person(self, profile: str):
        """The method, its optimiser and the person's state before the first step."""
        method = workloads.method_of(profile)
        optimizer = make_optimizer(
            dict.fromkeys(method.parts(), settings.RATE),
            beta1=0.9,
            beta2=0.999,
            epsilon=settings.EPSILON,
            weight_decay=settings.WEIGHT_DECAY,
        )
        prefix = f"{profile}/"
        own = {k.removeprefix(prefix): v for k, v in self.inputs.items() if k.startswith(prefix)}
        tree = jax.tree.map(jnp.array, pytrees.unflatten(own))
        return method, optimizer, init_state(optimizer, tree["trainable"], tree["given"])

    def pixels(self) -> np.ndarray:
        """The photo and its mirror, float32[2, H, W, 3]."""
        image = images.read_image(self.about["photo"])
        pixels = images.to_pixels(image, self.about["pixels"], center_crop=False)
        return np.stack([pixels, pixels[:, ::-1]])

    def keys_values(self, frozen: sd.Frozen) -> dict:
        """Keys and values of the negative prompt and of the prompt, as sample_jax.py computes
        them: leaves [2, T, inner]."""
        method, trainable, given = self.identity
        people, strength = (self.model, (method,), frozen, (trainable,)), np.float32(1)
        prompt, negative = self.tokens("prompt_ids"), self.tokens("negative_ids")
        named = programs.named_keys_values(*people, (given,), prompt, strength)
        unguided = programs.unguided_keys_values(*people, negative, strength)
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), unguided, named)

    def tokens(self, name: str) -> Tokens:
        """A prompt of one chunk whose tokens all weigh 1."""
        ids = np.asarray(self.inputs[name])[None]
        return Tokens(ids, np.ones(ids.shape, np.float32))

    def sampling(self, steps: int) -> programs.Sampling:
        """What is set of the sampler."""
        return programs.Sampling((self.about["pixels"],) * 2, "ddim", steps)

    def draw(self, pictures: int, steps: int) -> np.ndarray:
        """Pictures uint8[N, H, W, 3] of the prompt, drawn as sample_jax.py does on all devices.

        The first call of a number of pictures places the weights on the devices that draw them, and
        the others find them there: they take as long as the second prompt of a run.
        """
        assert programs.DECODED == settings.DECODED, (
            "PyTorch's stacks decode another number at once"
        )
        local = jax.local_devices()
        each = engine.rows_of_each(pictures, len(local), pictures)
        mesh = engine.mesh_of(local[: -(-pictures // each)])
        if pictures not in self.placed:
            self.placed[pictures] = jax.device_put(self.frozen, NamedSharding(mesh, P()))
        numbers = np.arange(each * mesh.size, dtype=np.uint32)
        rows = (
            jax.tree.map(
                lambda leaf: np.broadcast_to(leaf, (len(numbers), *leaf.shape)),
                jax.device_get(self.keys_values(self.frozen)),
            ),
            np.stack([0 * numbers, numbers], axis=1),
            np.full(len(numbers), settings.GUIDANCE, np.float32),
        )
        rows = jax.device_put(rows, NamedSharding(mesh, P("rows")))
        about = self.model, self.placed[pictures], *rows, self.sampling(steps)
        drawn = programs.draw_everywhere(mesh, *about)
        return images.to_uint8(np.asarray(drawn)[:pictures])

    def plain_step(self, method, optimizer, batch):
        """A step that draws its batch on the device."""

        def step(frozen, state, key):
            drawn = draw_batch(self.model, self.photos, key, state.step, batch)
            taken, metrics = train_step(self.model, method, optimizer, frozen, state, drawn)
            return taken, metrics.loss

        return step

    def encoding_step(self, method, optimizer, batch):
        """A step that encodes its pictures itself, as the published code does."""
        pixels = self.pixels()

        def step(frozen, state, key):
            drawn = draw_batch(self.model, self.photos, key, state.step, batch)
            mean, logvar = sd.encode_image(
                self.model, frozen, jnp.broadcast_to(pixels[:1], (batch, *pixels.shape[1:]))
            )
            fresh = mean + jnp.exp(0.5 * logvar) * drawn.noise
            taken, metrics = train_step(
                self.model, method, optimizer, frozen, state, drawn._replace(latents=fresh)
            )
            return taken, metrics.loss

        return step

    def whole_gradient_step(self, method, optimizer, batch):
        """A step that differentiates the UNet too, and clips by the norm of all gradients."""

        def step(frozen, state, key):
            drawn = draw_batch(self.model, self.photos, key, state.step, batch)

            def loss(trainable, unet):
                frozen_too = frozen._replace(unet=unet)
                parts = (frozen_too, trainable, state.given, drawn)
                return training_loss(self.model, method, *parts)[0]

            total, (grads, others) = jax.value_and_grad(loss, argnums=(0, 1))(
                state.trainable, frozen.unet
            )
            squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(others)]
            norm = jnp.sqrt(sum(squares))
            grads = jax.tree.map(lambda g: g / jnp.maximum(norm, 1.0), grads)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
            trainable = jax.tree.map(jnp.add, state.trainable, updates)
            return state._replace(
                trainable=trainable, opt_state=opt_state, step=state.step + 1
            ), total

        return step

    def save(self, name: str, **arrays) -> str:
        path = self.folder / f"{name}.npz"
        np.savez(path, **arrays)
        return str(path)


class CompiledTraining:
    """The program that train_jax.py runs, `program.step_people`, on the devices it would use."""

    def __init__(
        self, stack: JaxStack, profile: str, batch: int, room: int, people: int, changes: dict
    ):
        model = dataclasses.replace(stack.model, **changes)
        self._dtype = changes.get("compute_dtype")
        method, optimizer, state = stack.person(profile)
        mesh = devices.layout(None, people, people, batch).mesh
        self._frozen = place_frozen(stack.frozen, mesh, is_sharded=False)
        self._spread = NamedSharding(mesh, P("identity"))
        self._start = jax.device_get(pytrees.stack([state] * people))
        photos = jax.device_put(pytrees.stack([stack.photos] * people), self._spread)
        last = jax.device_put(np.full(people, 10**9, np.int32), self._spread)
        self._given = photos, jax.random.key(0), last
        self.restart()
        program = Program(model, method, optimizer, batch, mesh, steps_per_call=room)
        arguments = self.weights(), self.states, *self._given, jnp.int32(1)
        self._run = step_people.lower(program, *arguments).compile()

    def weights(self) -> sd.Frozen:
        """The frozen weights, in another type if that is what was changed."""
        return pytrees.cast(self._frozen, self._dtype) if self._dtype else self._frozen

    def restart(self) -> None:
        """Puts all people back to where they were before the first step."""
        self.states = jax.device_put(self._start, self._spread)

    def take(self, count: int, frozen: sd.Frozen) -> Metrics:
        """Takes a number of steps, at most as many as there is room for, in one call."""
        self.states, metrics = self._run(frozen, self.states, *self._given, jnp.int32(count))
        return metrics

    def device_bytes(self) -> int:
        """Weights, people, and what the program needs beside them."""
        planned = self._run.memory_analysis()
        given = (self._frozen, self.states, self._given[0])
        own = planned.temp_size_in_bytes + planned.output_size_in_bytes
        own -= planned.alias_size_in_bytes
        return own + sum(leaf.nbytes for leaf in jax.tree.leaves(given))


def convolve(layout: str, strides, padding):
    """A jitted convolution of images and kernels that `arrange` has brought into a layout."""
    names = ("NHWC", "HWIO", "NHWC") if layout == "NHWC" else ("NCHW", "OIHW", "NCHW")
    return jax.jit(
        lambda x, w: jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=names)
    )


def arrange(layout: str, x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """An image [B, H, W, C] and a kernel [H, W, I, O] in a layout."""
    return (x, w) if layout == "NHWC" else (x.transpose(0, 3, 1, 2), w.transpose(3, 2, 0, 1))


def seconds_of(function, *arguments) -> float:
    """The fastest of ten calls, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(10):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    folder, compute_dtype = sys.argv[1:]
    stack = JaxStack(Path(folder), compute_dtype)
    worker.serve({name: getattr(stack, name) for name in CALLS})


if __name__ == "__main__":
    main()
