"""This project, as a stack that the benchmark compares and times.

python -m benchmarks.stack_jax FOLDER COMPUTE_DTYPE
"""

import dataclasses
import functools
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import flops, settings, worker, workloads
from idea_jax import pytrees, sample
from idea_jax.data import images
from idea_jax.models import flash, sd
from idea_jax.train_step import (
    Batch,
    Photos,
    draw_and_step,
    draw_batch,
    init_state,
    make_optimizer,
    train_step,
    training_loss,
)


class Stack:
    """The loaded model and the inputs; every public method answers one kind of request."""

    def __init__(self, folder: Path, compute_dtype: str):
        self.folder = folder
        self.about = settings.read(folder)
        self.inputs = dict(np.load(folder / "inputs.npz"))
        checkpoint = Path(self.about["checkpoint"])
        model, self.frozen = sd.load(checkpoint, compute_dtype=compute_dtype)
        attention = flash.resolve("auto", jax.default_backend(), compute_dtype)
        self.model = dataclasses.replace(model, attention=attention)
        jax.block_until_ready(self.frozen)
        self.compiled = {}

    # What is compared

    def train_outputs(self, profile: str) -> str:
        """Losses and pseudo tokens of a few steps on given draws, as a file."""
        method, optimizer, state = self.person(profile)
        step = jax.jit(functools.partial(train_step, self.model, method, optimizer))
        photos, losses = self.photos(), []
        for index in range(settings.COMPARED_STEPS):
            state, metrics = step(self.frozen, state, self.given_batch(photos, index))
            losses.append(float(metrics.loss))
        return self.save(
            f"jax-{profile}", losses=losses, tokens=np.asarray(state.trainable["pseudo_tokens"])
        )

    def sample_outputs(self) -> str:
        """Pictures of a few steps, as a file."""
        count, steps = settings.COMPARED_SAMPLING
        return self.save("jax-pictures", pictures=np.asarray(self.draw(count, steps)))

    # What is timed

    def train_time(self, profile: str, batch: int, steps: int) -> float:
        """Seconds of a block of training steps; what they draw is drawn on the device."""
        kind = ("train", profile, batch)
        if kind not in self.compiled:
            method, optimizer, state = self.person(profile)
            run = functools.partial(draw_and_step, self.model, method, optimizer, batch)
            run = jax.jit(run, donate_argnums=1)
            self.compiled[kind] = [run, state, self.photos()]
        run, state, photos = self.compiled[kind]
        key = jax.random.key(0)
        started = time.perf_counter()
        for _ in range(steps):
            state, metrics = run(self.frozen, state, photos, key)
        jax.block_until_ready((state, metrics))
        seconds = time.perf_counter() - started
        self.compiled[kind][1] = state
        return seconds

    def sample_time(self, pictures: int, steps: int) -> float:
        """Seconds from the prompt's tokens to pictures."""
        started = time.perf_counter()
        jax.block_until_ready(self.draw(pictures, steps))
        return time.perf_counter() - started

    def people_time(self, people: int, batch: int, steps: int) -> float:
        """Seconds of a block of steps of several people in one program, by `jax.vmap`."""
        kind = ("people", people, batch)
        if kind not in self.compiled:
            method, optimizer, state = self.person("paper")
            photos = self.photos()

            def one(frozen, state, key):
                drawn = draw_batch(self.model, photos, key, state.step, batch)
                return train_step(self.model, method, optimizer, frozen, state, drawn)

            run = jax.jit(jax.vmap(one, in_axes=(None, 0, 0)), donate_argnums=1)
            self.compiled[kind] = [run, pytrees.stack([state] * people)]
        return self.block(kind, steps, self.frozen, jax.random.split(jax.random.key(0), people))

    def scanned_time(self, batch: int, steps: int) -> float:
        """Seconds of a block of steps as one program, a `lax.scan` over all of them."""
        kind = ("scan", batch, steps)
        if kind not in self.compiled:
            method, optimizer, state = self.person("paper")
            photos = self.photos()

            def run(frozen, state, key):
                def one(state, _):
                    drawn = draw_batch(self.model, photos, key, state.step, batch)
                    return train_step(self.model, method, optimizer, frozen, state, drawn)

                return jax.lax.scan(one, state, length=steps)

            self.compiled[kind] = [jax.jit(run, donate_argnums=1), state]
        return self.block(kind, 1, self.frozen, jax.random.key(0))

    def ablated_time(self, without: str, batch: int, steps: int) -> float:
        """Seconds of a block of steps with one of the measures taken back.

        Args:
          without: "moments" (the VAE encodes in every step), "trainables" (the gradient of the
            whole UNet is taken and clipped with the rest, as a masked optimiser does), "flash"
            (plain attention at every length) or "bfloat16" (float32 everywhere).
        """
        kind = (without, batch)
        if kind not in self.compiled:
            method, optimizer, state = self.person("paper")
            make = {
                "moments": self.encoding_step,
                "trainables": self.whole_gradient_step,
                "flash": functools.partial(self.plain_step, attention="xla"),
                "bfloat16": functools.partial(
                    self.plain_step, attention="xla", compute_dtype="float32"
                ),
            }[without]
            run = jax.jit(make(method, optimizer, batch), donate_argnums=1)
            self.compiled[kind] = [run, state]
        # Float32 weights exist only while they are measured.
        frozen = self.frozen if without != "bfloat16" else pytrees.cast(self.frozen, jnp.float32)
        return self.block(kind, steps, frozen, jax.random.key(0))

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

    def ceiling(self, size: int) -> float:
        """FLOP/s of one square product in the compute dtype, the best of ten."""
        a = jnp.ones((size, size), self.model.dtype)
        return 2 * size**3 / seconds_of(jax.jit(jnp.matmul), a, a)

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
        found = Counter(flops.convolutions(jaxpr.jaxpr))
        timed = []
        for (image, kernel, strides, padding), times in found.items():
            x = jnp.ones(image, self.model.dtype)
            w = jnp.ones(kernel, self.model.dtype)
            seconds = {
                layout: seconds_of(convolve(layout, strides, padding), *arrange(layout, x, w))
                for layout in ("NHWC", "NCHW")
            }
            timed.append({"image": image, "kernel": kernel, "times": times, **seconds})
        return sorted(timed, key=lambda one: -one["times"] * one["NHWC"])

    # What is counted

    def counted(self, batch: int, pictures: int, steps: int) -> dict[str, float]:
        """FLOPs that one training step and one call of the sampler need; nothing is run."""
        method, optimizer, state = self.person("paper")
        step = functools.partial(train_step, self.model, method, optimizer)
        photos = jax.eval_shape(self.photos)
        draw = functools.partial(draw_batch, self.model, size=batch)
        key = jax.eval_shape(lambda: jax.random.key(0))
        drawn = jax.eval_shape(draw, photos, key, jax.ShapeDtypeStruct((), jnp.int32))
        return {
            "train_step": flops.needed(step, self.frozen, state, drawn),
            "sampling": flops.needed(lambda: self.draw(pictures, steps)),
        }

    def memory(self) -> int:
        """Peak bytes: of the device, or on a CPU of the process."""
        measured = jax.devices()[0].memory_stats()
        if measured:
            return measured["peak_bytes_in_use"]
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def release(self) -> None:
        """JAX frees device memory by itself."""

    def kernels(self, profile: str, batch: int, steps: int) -> list[list]:
        """The ten operations that take most of a block of steps: [name, share of all]."""
        self.train_time(profile, batch, steps)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                self.train_time(profile, batch, steps)
            (path,) = Path(folder).rglob("*.xplane.pb")
            profile_data = jax.profiler.ProfileData.from_serialized_xspace(path.read_bytes())
        return top_ten(profile_data)

    # Parts

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

    def photos(self) -> Photos:
        """The cached moments of the photo."""
        mean, logvar = jax.jit(sd.encode_image, static_argnums=0)(
            self.model, self.frozen, self.pixels()
        )
        return Photos(mean[None], logvar[None], jnp.int32(1), jnp.asarray(self.inputs["token_ids"]))

    def given_batch(self, photos: Photos, index: int) -> Batch:
        """The batch of the draws that all stacks are given."""
        draws = {
            name.removeprefix("draws/"): value[index]
            for name, value in self.inputs.items()
            if name.startswith("draws/")
        }
        mean, logvar = (moment[0][draws["mirror"]] for moment in (photos.mean, photos.logvar))
        return Batch(
            latents=mean + jnp.exp(0.5 * logvar) * draws["posterior"],
            noise=jnp.asarray(draws["noise"]),
            timesteps=jnp.asarray(draws["timesteps"], jnp.int32),
            token_ids=photos.token_ids[draws["rows"]],
        )

    def draw(self, pictures: int, steps: int) -> jax.Array:
        """Pictures float32[N, H, W, 3] of the prompt."""
        method, _, state = self.person("paper")
        kv = sample.prompt_keys_values(
            method,
            self.model,
            self.frozen,
            state.trainable,
            state.given,
            self.inputs["prompt_ids"],
            self.inputs["negative_ids"],
            jnp.float32(1),
        )
        return sample.draw(
            self.model,
            self.frozen,
            kv,
            jnp.uint32(0),
            jnp.arange(pictures, dtype=jnp.int32),
            jnp.float32(settings.GUIDANCE),
            size=(self.about["pixels"],) * 2,
            scheduler="ddim",
            steps=steps,
            is_guided=True,
            eta=0.0,
        )

    def plain_step(self, method, optimizer, batch, **settings):
        """The step of a model with other settings."""
        model, photos = dataclasses.replace(self.model, **settings), self.photos()

        def step(frozen, state, key):
            drawn = draw_batch(model, photos, key, state.step, batch)
            taken, metrics = train_step(model, method, optimizer, frozen, state, drawn)
            return taken, metrics.loss

        return step

    def encoding_step(self, method, optimizer, batch):
        """A step that encodes its pictures itself, as the published code does."""
        pixels, photos = self.pixels(), self.photos()

        def step(frozen, state, key):
            drawn = draw_batch(self.model, photos, key, state.step, batch)
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
        photos = self.photos()

        def step(frozen, state, key):
            drawn = draw_batch(self.model, photos, key, state.step, batch)

            def loss(trainable, unet):
                frozen_too = frozen._replace(unet=unet)
                parts = (trainable, frozen_too, state.given, drawn)
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


def top_ten(data: jax.profiler.ProfileData) -> list[list]:
    """[name, share of the time of all] of the operations that take most, numbers cut off names."""
    spent = Counter()
    for plane in data.planes:
        for line in plane.lines:
            if plane.name.startswith("/device:GPU"):
                holds_operations = line.name.startswith("Stream")
            elif plane.name.startswith("/device:TPU"):
                holds_operations = line.name == "XLA Ops"
            else:
                holds_operations = "XLAEigen" in line.name or "XLATfrtCpuClient" in line.name
            for event in line.events if holds_operations else ():
                # On a CPU the executor's own events, which hold all others, have C++ names.
                if "GPU" in plane.name or "::" not in event.name:
                    spent[event.name.split(".")[0]] += event.duration_ns
    total = sum(spent.values()) or 1
    return [[name, time_ns / total] for name, time_ns in spent.most_common(10)]


def main() -> None:
    folder, compute_dtype = sys.argv[1:]
    stack = Stack(Path(folder), compute_dtype)
    names = (
        *("train_outputs", "sample_outputs", "train_time", "sample_time", "people_time"),
        *(
            "scanned_time",
            "ablated_time",
            "ceiling",
            "convolutions",
            "counted",
            "memory",
            "release",
            "kernels",
        ),
    )
    worker.serve({name: getattr(stack, name) for name in names})


if __name__ == "__main__":
    main()
