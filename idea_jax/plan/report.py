"""What a plan says: numbers as a dictionary, and the same as a table."""

import math

from idea_jax.config.settings import COMPUTE_DTYPES
from idea_jax.plan.compiled import Compiled
from idea_jax.plan.settings import PlanConfig
from idea_jax.plan.work import Planned, kernel_of
from idea_jax.runtime.chips import CHIPS, Chip, hosts_of
from idea_jax.runtime.memory import gigabytes

UNITS = {"train": "people", "enhancer": "samples", "sample": "pictures"}


def facts(
    cfg: PlanConfig, chip: Chip, devices: int, job: Planned, compiled: Compiled | None
) -> dict:
    """Everything that is known of a job, in bytes, FLOPs, seconds and hours; None: not known.

    Args:
      compiled: what XLA says of the compiled program, if it was compiled.
    """
    dtype = COMPUTE_DTYPES[cfg.mixed_precision]
    peak, unit = chip.peak(dtype), UNITS[cfg.what]
    arithmetic = job.flops / (peak * cfg.utilisation) if peak else None
    moving = job.traffic / chip.bandwidth if chip.bandwidth else None
    seconds = max(arithmetic, moving) if arithmetic is not None else None
    hours = job.calls * seconds / 3600 if seconds is not None else None
    done = job.per_call * job.calls if cfg.what == "enhancer" else cfg.people
    price = cfg.price_per_hour
    return {
        "what": cfg.what,
        "checkpoint": cfg.checkpoint,
        "device": cfg.device,
        "devices": devices,
        "processes": hosts_of(chip, devices),
        "source": chip.source,
        "mixed_precision": cfg.mixed_precision,
        "attention": kernel_of(cfg, chip),
        "mesh": job.mesh,
        "shard_frozen": job.shard_frozen,
        "remat": None if cfg.what == "sample" else "blocks" if job.remat else "none",
        f"{unit}_per_call": job.per_call,
        "memory": {
            **job.memory,
            "temporary (estimate)": job.temporary,
            "spare for the estimate's error": job.spare,
            "all": job.total(),
            "room": chip.room() or None,
        },
        "fits": fits(chip, job, compiled),
        "would_fit": [] if fits(chip, job, compiled) is not False else remedies(cfg, chip, job),
        "compiled": compiled._asdict() if compiled is not None else None,
        "collectives_per_call": [item._asdict() for item in job.collectives],
        "flops_per_call": job.flops,
        "traffic_per_call (estimate)": job.traffic,
        "peak_flops": peak or None,
        "bandwidth": chip.bandwidth or None,
        "utilisation (assumed)": cfg.utilisation,
        "calls": job.calls,
        "seconds_per_call": seconds,
        "limited_by": None if seconds is None else ("memory" if seconds == moving else "products"),
        "hours": hours,
        f"{unit}_per_hour": done / hours if hours else None,
        "cost": hours * devices * price if hours is not None and price is not None else None,
    }


def fits(chip: Chip, job: Planned, compiled: Compiled | None) -> bool | None:
    """Whether the memory of a device is enough, by the compiled program if there is one."""
    if not chip.room():
        return None
    beside = job.memory.get("autoencoder beside them", 0)
    if compiled is not None and compiled.temporary is None:
        return False
    return (compiled.total + beside if compiled is not None else job.total()) <= chip.room()


def remedies(cfg: PlanConfig, chip: Chip, job: Planned) -> list[str]:
    """What would make a job fit that does not."""
    found, room, total = [], chip.room(), job.total()
    weights = job.memory.get("weights that the step reads", 0)
    beside = job.memory.get("autoencoder beside them", 0)
    data = job.mesh.get("data", 1)
    if cfg.what == "train":
        people = job.per_call // job.mesh["identity"]
        each = (total - weights - beside) / people
        fewer = math.floor((room - weights - beside) / each)
        if 0 < fewer < people:
            most = fewer * job.mesh["identity"]
            found.append(f"--identities_per_step {most} instead of {job.per_call}")
        samples = -(-total // room) * data
        if fewer < 1:
            found.append(f"more devices on data than {data}, such as --mesh data={samples}")
    if cfg.mixed_precision == "no":
        found.append("--mixed_precision bf16, which halves the weights and most of the rest")
    split = total - (weights + beside) * (1 - 1 / data)
    if data > 1 and not job.shard_frozen and split <= room:
        found.append(f"--shard_frozen, which leaves {gigabytes(weights / data)} of weights")
    if cfg.what != "train":
        found.append("a smaller --batch")
    larger = [other.name for other in CHIPS.values() if total <= other.room()]
    if larger:
        found.append(f"a device with more memory: {', '.join(larger)}")
    return found


def table(known: dict) -> str:
    """The facts as a Markdown table, what is exact and what is estimated or assumed kept apart."""
    unit = next(
        key for key in known if key.endswith("_per_call") and key.split("_")[0] in UNITS.values()
    ).removesuffix("_per_call")
    mesh = ",".join(f"{axis}={size}" for axis, size in known["mesh"].items())
    rows = [
        ("program", f"{known['what']} of {known['checkpoint']}, {known['mixed_precision']}"),
        ("devices", f"{known['device']}: {known['devices']} in {known['processes']} processes"),
        ("mesh", mesh + (", --shard_frozen" if known["shard_frozen"] else "")),
        (f"{unit} a call", f"{known[f'{unit}_per_call']:,}"),
    ]
    if known["remat"] is not None:
        rows.append(("computed again in the backward pass", f"--remat {known['remat']}"))
    for name, size in known["memory"].items():
        if size is not None:
            rows.append((f"{name}, a device", gigabytes(size)))
    if known["compiled"] is not None:
        found = known["compiled"]
        rows.append(("all, as compiled, a device", gigabytes(found["total"])))
        if found["temporary"] is not None:
            rows.append(("of it temporary", gigabytes(found["temporary"])))
            rows.append(("of it the program itself", gigabytes(found["code"])))
        rows.append(("compiled in", f"{found['seconds']:.0f} s"))
    answer = {True: "yes", False: "no", None: "not known"}[known["fits"]]
    rows.append(("fits", answer))
    rows += [("would fit", words) for words in known["would_fit"]]
    for item in known["collectives_per_call"]:
        rows.append(
            (
                f"{item['kind']} over {'+'.join(item['axes'])}, a call",
                f"{item['calls']} of {gigabytes(item['bytes'])} in all, a device",
            )
        )
    if not known["collectives_per_call"]:
        rows.append(("collectives", "none"))
    rows += [
        ("products, a call and device", f"{known['flops_per_call'] / 1e12:.2f} TFLOP"),
        (
            "memory traffic (estimate)",
            f"{known['traffic_per_call (estimate)'] / 1e9:.1f} GB",
        ),
    ]
    if known["seconds_per_call"] is not None:
        limit = known["limited_by"]
        used = known["utilisation (assumed)"]
        rows += [
            (
                f"a call at {used:g} of the peak (assumed)",
                f"{known['seconds_per_call']:.3g} s, limited by {limit}",
            ),
            ("calls", f"{known['calls']:,}"),
            ("time", f"{known['hours']:.3g} h"),
            (f"{unit} an hour", f"{known[f'{unit}_per_hour']:,.0f}"),
        ]
    if known["cost"] is not None:
        rows.append(("cost", f"{known['cost']:,.2f}"))
    rows.append(("numbers of the device", known["source"]))
    lines = ["| what | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)
