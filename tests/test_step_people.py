"""The step of many people at once: what its compiled program holds, and that nobody notices it."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_train_step import PAPER, optimizer_for, person

from idea_jax import pytrees, random_sd
from idea_jax.models import sd
from idea_jax.pytrees import stream
from idea_jax.training.program import Program, check_plateaus, shard_axes, shard_specs, step_people
from idea_jax.training.step import EVALUATION_SAMPLES, Plateau, draw_batch, training_loss

PLACES, BATCH = 4, 2
ALL = np.full(PLACES, 100, np.int32)
OPTIMIZER = optimizer_for(PAPER)
PEOPLE = P("identity")


@pytest.fixture(scope="module")
def loaded():
    """A model of one level, so that its step compiles quickly; random weights."""
    tiny = random_sd.config("tiny", "sd2", vocab_size=120)
    unet = dataclasses.replace(
        tiny.unet,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(32,),
        transformer_layers=(1,),
        num_attention_heads=(2,),
    )
    text = dataclasses.replace(tiny.text, num_hidden_layers=1)
    model = dataclasses.replace(tiny, unet=unet, text=text)
    rng = np.random.default_rng(0)

    def fill(leaf):
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 25
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(fan_in), jnp.float32)

    return model, jax.tree.map(fill, sd.shapes(model))


@pytest.fixture(scope="module")
def everybody(loaded):
    return [person(loaded, PAPER, seed, pictures=3)[:2] for seed in range(6)]


class Steps:
    """The step on a mesh: its compiled text, and a way to take steps with it."""

    def __init__(
        self, loaded, everybody, identity, data, *, is_sharded=False, places=PLACES, room=1
    ):
        model, frozen = loaded
        devices = np.array(jax.devices()[: identity * data]).reshape(identity, data)
        self.mesh = Mesh(devices, ("identity", "data"), axis_types=(AxisType.Auto,) * 2)
        specs = shard_specs(frozen, data) if is_sharded else jax.tree.map(lambda _: P(), frozen)
        self.frozen = jax.tree.map(lambda leaf, spec: self.put(leaf, spec), frozen, specs)
        self.program = Program(model, PAPER, OPTIMIZER, BATCH, self.mesh, is_sharded, room)
        states, photos = self.stacked([everybody[0]] * places)
        self.lowered = step_people.lower(
            self.program,
            self.frozen,
            states,
            photos,
            jax.random.key(0),
            ALL[:places],
            np.int32(1),
        )

    def put(self, tree, spec=PEOPLE):
        return jax.device_put(tree, NamedSharding(self.mesh, spec))

    def stacked(self, people):
        return self.put(jax.tree.map(lambda *leaves: np.stack(leaves), *people))

    def text(self):
        return self.lowered.compile().as_text()

    def train(self, people, calls=(1, 1), last=ALL):
        """Trainables of everybody, and the metrics of the last step, after calls of some steps."""
        states, photos = self.stacked(people)
        for count in calls:
            states, metrics = step_people(
                self.program,
                self.frozen,
                states,
                photos,
                jax.random.key(0),
                self.put(last),
                np.int32(count),
            )
        host = jax.device_get(states)
        lanes = [jax.tree.map(lambda x, i=i: x[i], host) for i in range(len(people))]
        return lanes, jax.tree.map(lambda row: row[calls[-1] - 1], metrics)


@pytest.fixture(scope="module")
def alone(loaded, everybody):
    return Steps(loaded, everybody, 1, 1)


def convolutions(text):
    """Of each convolution of a compiled program: the length of its result's batch axis, groups."""
    found = []
    for line in text.splitlines():
        match = re.search(r"= \w+\[([\d,]+)\]\S* convolution\(.*dim_labels=\w+->(\w+)", line)
        if match:
            batch = int(match[1].split(",")[match[2].index("b")])
            found.append((batch, "group_count" in line))
    return found


def multiplications(text):
    """Of all products and convolutions of a program as it is given to the compiler."""
    total = 0
    for line in text.splitlines():
        kind = re.search(r"stablehlo\.(convolution|dot_general)", line)
        if kind is None:
            continue
        shapes = re.findall(r"tensor<((?:\d+x)*)\w+>", line.rpartition(" : ")[2])
        left, right, out = ([int(side) for side in shape.split("x")[:-1]] for shape in shapes)
        if kind[1] == "convolution":
            labels = re.search(r"x\[([^\]]*)\]->", line)[1].split(", ")
            total += math.prod(out) * math.prod(right) // right[labels.index("o")]
        else:
            summed = re.search(r"contracting_dims = \[([\d, ]*)\] x", line)
            axes = summed[1].split(", ") if summed and summed[1] else ()
            total += math.prod(out) * math.prod(left[int(axis)] for axis in axes)
    return total


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_each_convolution_stays_one_over_the_samples_of_all_people(loaded, everybody, alone):
    many = convolutions(alone.text())
    one = Steps(loaded, everybody, 1, 1, places=1)
    expected = one.lowered.as_text().count("stablehlo.convolution")
    assert len(many) == expected > 10
    assert set(many) == {(PLACES * BATCH, False)}
    # The work grows with the people, and with nothing else; random numbers are drawn once.
    work = [multiplications(program.lowered.as_text()) for program in (one, alone)]
    assert work[1] == PLACES * work[0] > 10**7
    flops = [program.lowered.cost_analysis()["flops"] for program in (one, alone)]
    assert flops[1] == pytest.approx(PLACES * flops[0], rel=1e-3)


def test_result_depends_on_nobody_else_and_not_on_the_place(everybody, alone):
    zero, one, two, three, four, five = everybody
    first, _ = alone.train([zero, one, two, three])
    assert_equal(alone.train([one, zero, four, five])[0][1], first[0])
    # Beside empty places, and beside somebody whose numbers are none.
    broken = one[0]._replace(trainable=jax.tree.map(lambda x: x * np.nan, one[0].trainable)), one[1]
    last = np.array([0, 100, 100, 0], np.int32)
    others, metrics = alone.train([zero, broken, zero, one], last=last)
    assert_equal(others[2], first[0])
    assert np.asarray(metrics.finite).tolist()[1:3] == [False, True]
    assert_equal(others[1], broken[0])
    # An empty place keeps what it held.
    assert_equal(others[0], jax.device_get(zero[0]))


@pytest.mark.parametrize("is_sharded", [False, True])
def test_people_need_no_collective_and_samples_one_all_reduce(loaded, everybody, alone, is_sharded):
    spread = Steps(loaded, everybody, 2, 2, is_sharded=is_sharded)
    text = spread.text()
    # Devices 0, 1 hold the samples of some people, 2, 3 those of the others.
    ((shapes, reduce),) = re.findall(r"= (.*?) all-reduce(?:-start)?\((.*)", text)
    # It moves the gradients of what is trained, of half of the people, and three metrics of each.
    (size,) = re.findall(r"f32\[([\d,]+)\]", shapes)
    own = pytrees.count(everybody[0][0].trainable)
    assert math.prod(map(int, size.split(","))) == PLACES // 2 * (own + 3)
    groups = r"replica_groups=(\{\{0,1\},\{2,3\}\}|\[2,2\]<=\[4\])"
    assert re.search(groups, reduce)
    others = re.findall(r"(all-gather|reduce-scatter|all-to-all|collective-permute)\S*\(.*", text)
    assert set(others) == ({"all-gather"} if is_sharded else set())
    gathers = re.findall(r"all-gather(?:-start)?\(.*", text)
    assert all(re.search(groups, gather) for gather in gathers)
    assert {batch for batch, _ in convolutions(text)} == {PLACES * BATCH // 4}
    people = everybody[:PLACES]
    expected, metrics = alone.train(people)
    got, spread_metrics = spread.train(people)
    np.testing.assert_allclose(spread_metrics.loss, metrics.loss, rtol=1e-5)
    for one, other in zip(got, expected, strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one.trainable, other.trainable
        )
    if is_sharded:
        sharded = jax.tree.leaves(spread.frozen.unet)
        # The backward pass gathers once more what it needs, instead of keeping the whole model.
        axes = shard_axes(loaded[1], 2)
        split = sum(axis >= 0 for axis in jax.tree.leaves(axes._replace(vae={})))
        lowered = spread.lowered.as_text()
        assert lowered.count("stablehlo.all_gather") > 1.5 * split
        # Nor is anything kept but products, of which the forward pass has half at most; and none
        # is computed twice.
        products = sum(lowered.count(f"stablehlo.{op}") for op in ("dot_general", "convolution"))
        assert 0 < lowered.count("stablehlo.reduce_precision") < products / 2
        whole = multiplications(alone.lowered.as_text()) / 4
        assert multiplications(lowered) == pytest.approx(whole, rel=0.01)
        held = sum(leaf.addressable_shards[0].data.size for leaf in sharded)
        assert held < 0.6 * pytrees.count(spread.frozen.unet)


def test_several_steps_in_one_call_are_those_of_single_calls(loaded, everybody, alone):
    """Also somebody who ends in the middle of a call, and somebody whose numbers are none."""
    several = Steps(loaded, everybody, 2, 1, room=3)
    zero, one, two, three, _, _ = everybody
    broken = two[0]._replace(trainable=jax.tree.map(lambda x: x * np.nan, two[0].trainable)), two[1]
    people, last = [zero, one, broken, three], np.array([100, 2, 100, 100], np.int32)
    expected, metrics = alone.train(people, (1,) * 5, last)
    got, row = several.train(people, (3, 2), last)
    for one, other in zip(got, expected, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)
    assert [int(state.step) for state in got] == [5, 2, 0, 5]
    np.testing.assert_allclose(row.loss, metrics.loss, rtol=1e-5)
    assert np.asarray(row.finite).tolist() == [True, True, False, True]
    text = several.text()
    assert not re.findall(r"(all-\w+|reduce-scatter|collective-permute)\S*\(", text)
    assert {batch for batch, _ in convolutions(text)} == {PLACES * BATCH // 2}


def test_evaluation_is_the_loss_on_samples_that_never_change(loaded, everybody, alone):
    """A gain of less than 1% is none; who is not due keeps what was known."""
    model, frozen = loaded
    (state, photos), key = everybody[0], jax.random.key(0)
    drawn = draw_batch(model, photos, stream(key, "evaluation"), 0, EVALUATION_SAMPLES)
    steps = np.arange(1, 2 * EVALUATION_SAMPLES, 2) * 1000 // (2 * EVALUATION_SAMPLES)
    drawn = drawn._replace(timesteps=jnp.asarray(steps, jnp.int32))
    _, (loss, _) = training_loss(model, PAPER, frozen, state.trainable, state.given, drawn)

    def with_plateau(best, since):
        return state._replace(plateau=Plateau(np.float32(best), np.int32(since)))

    loss = float(loss)
    cases = {
        (np.inf, 0): (loss, 0),
        (loss * 1.02, 3): (loss, 0),
        (loss * 1.005, 3): (loss * 1.005, 4),
        (loss * 2, 1): (loss * 2, 1),
    }
    for program in (alone, Steps(loaded, everybody, 2, 2, is_sharded=True)):
        states, everyone = program.stacked([(with_plateau(*case), photos) for case in cases])
        due = program.put(np.array([True, True, True, False]))
        seen = check_plateaus(program.program, program.frozen, states, everyone, key, due)
        for lane, (best, since) in enumerate(cases.values()):
            np.testing.assert_allclose(seen.plateau.best[lane], best, rtol=1e-5)
            assert int(seen.plateau.since[lane]) == since
        assert_equal(np.asarray(seen.step), np.zeros(PLACES, np.int32))
