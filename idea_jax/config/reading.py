"""From profile defaults, a YAML file and flags to a checked dataclass of settings.

Later sources win: field default < profile default < YAML (`--config FILE`) < flag.
"""

import argparse
import dataclasses
import difflib
import logging
import math
import types
import typing
from collections.abc import Sequence
from typing import Any

import yaml

from idea_jax.config.settings import (
    BASIS_DEFAULTS,
    ENHANCER_DEFAULTS,
    ENHANCER_PRESETS,
    NOT_WITH_ENHANCER,
    PARTS,
    PROFILE_DEFAULTS,
    SECRETS,
    ConfigError,
    SampleConfig,
    TrainConfig,
    is_guided,
    names_elsewhere,
    settings_of,
)

log = logging.getLogger(__name__)


def parse(cls: type, argv: Sequence[str], **about: Any) -> Any:
    """Reads command-line arguments into a dataclass of settings, such as `TrainConfig`.

    Args:
      cls: the dataclass.
      argv: arguments without the program's name. `--config FILE` names a YAML file of settings.
      **about: passed to `argparse.ArgumentParser` (`prog`, `description`, `usage`).

    Raises:
      ConfigError: an unknown or repeated key, a value of the wrong type, settings that do not fit.
      SystemExit: an unknown flag, or `--help`, from argparse.
    """
    # Argparse's own usage names every flag, and would bury the one line that says what is wrong.
    about = {"usage": "%(prog)s [--FLAG VALUE ...]    (--help tells all flags)"} | about
    parser = argparse.ArgumentParser(allow_abbrev=False, **about)
    parser.add_argument("--config", help="YAML file; its keys are the flags below, flags win")
    for spec in settings_of(cls):
        add_flag(parser, spec)
    foreign = FOREIGN_FLAGS.get(cls, {})
    for name, why in foreign.items():
        parser.add_argument(
            f"--{name}",
            nargs="?",
            action="append",
            metavar="VALUE",
            default=argparse.SUPPRESS,
            help=f"accepted and ignored: {why}",
        )
    flags = vars(parser.parse_args(argv))
    for name, why in foreign.items():
        if flags.pop(name, None) is not None:
            log.warning("--%s is ignored: %s", name, why)
    path = flags.pop("config", None)
    return build(cls, read_yaml(path) if path else {}, flags, source=path)


class OneOfItsNames(argparse.Action):
    """Stores a setting that has several names: whoever gives two of them means the same by both."""

    given: tuple[str | None, Any] | None = None

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        name, value = self.given or (option_string, values)
        if name != option_string and value != values:
            parser.error(
                f"{name} {value} and {option_string} {values} say the same thing twice, and "
                "differently: give one of them"
            )
        self.given = option_string, values
        setattr(namespace, self.dest, values)


def flags_of(name: str) -> list[str]:
    """The flag of a setting, and those by which other programs call it."""
    return [f"--{one}" for one in (name, *names_elsewhere(name))]


def add_flag(parser: argparse.ArgumentParser, spec: dataclasses.Field) -> None:
    kind, is_list = plain_type(spec.type)
    if spec.metadata["switch"]:
        switch, on, off = spec.metadata["switch"]
        parser.add_argument(
            f"--{switch}",
            action=argparse.BooleanOptionalAction,
            default=argparse.SUPPRESS,
            help=plain(f"the same as --{spec.name} {on}; --no-{switch} as --{spec.name} {off}"),
        )
    names = [*flags_of(spec.name), *(f"--{name}" for name in spec.metadata["aliases"])]
    # Absent flags stay absent (SUPPRESS), so that the YAML file and the profile can speak.
    text = spec.metadata["help"]
    if "required" not in spec.metadata and spec.default is not None:
        text += f" (default: {spec.default})"
    options: dict = {"dest": spec.name, "default": argparse.SUPPRESS, "help": plain(text)}
    if kind is bool:
        parser.add_argument(*names, action=argparse.BooleanOptionalAction, **options)
        return
    if is_list:
        options |= {"nargs": "+", "action": "extend"}
    elif len(names) > 1:
        options["action"] = OneOfItsNames
    parser.add_argument(*names, type=kind, choices=spec.metadata["choices"], **options)


def plain(text: str) -> str:
    """A help text as argparse prints it unchanged: it would take a bare % for a format."""
    return text.replace("%", "%%")


# Flags of the original scripts and of diffusers' textual inversion that have no meaning here, and
# why: their commands run as they stand. docs/guide.md has all flags side by side.
FOREIGN_FLAGS: dict[type, dict[str, str]] = {
    TrainConfig: {
        "allow_tf32": "JAX chooses the precision of products; JAX_DEFAULT_MATMUL_PRECISION sets it",
        "dataloader_num_workers": "photos are encoded once, before the first step",
        "device": "JAX takes the accelerator that is there; JAX_PLATFORMS names another",
        "enable_xformers_memory_efficient_attention": "--attention chooses the kernel",
        "gradient_checkpointing": "a step keeps little in memory as it is",
        "learnable_property": "a person is learned",
        "local_rank": "--distributed joins processes: docs/scale.md",
        "no_safe_serialization": "results are safetensors always",
        "num_train_epochs": "--max_train_steps counts steps",
        "repeats": "each step draws photos at random; --max_train_steps counts steps",
        "save_as_full_pipeline": "the checkpoint stays as it is; results load beside it",
        "validation_epochs": "--validation_steps counts steps",
    },
    SampleConfig: {
        "device": "JAX takes the accelerator that is there; JAX_PLATFORMS names another",
    },
}


def build(cls: type, file_values: dict, flags: dict, *, source: str | None = None) -> Any:
    """Merges the layers and returns the checked dataclass.

    Raises:
      ConfigError: as `parse`.
    """
    known = {spec.name: spec for spec in settings_of(cls)}
    file_values, flags = without_switches(known, file_values), without_switches(known, flags)
    for name, value in file_values.items():
        if name not in known:
            close = [other for other in names_elsewhere(str(name)) if other in known]
            close += difflib.get_close_matches(str(name), known, n=1, cutoff=0.7)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(known)}"
            raise ConfigError(f"unknown key {name!r} in {source}{hint}")
        check_type(known[name], value, source)
    given = {**file_values, **flags}
    missing = [n for n, spec in known.items() if "required" in spec.metadata and n not in given]
    if missing:
        raise ConfigError(
            "missing: " + ", ".join(f"--{name}" for name in missing) + " (see --help)"
        )
    if cls is TrainConfig:
        profile = given.get("profile", known["profile"].default)
        if profile not in PROFILE_DEFAULTS:
            raise ConfigError(
                f"profile must be one of {', '.join(PROFILE_DEFAULTS)}, got {profile!r}"
            )
        said = given
        # Whoever wants no regulariser need not set the profile's weight to zero as well.
        unpulled = {"reg_weight": 0.0} if given.get("regulariser") == "none" else {}
        given = {**PROFILE_DEFAULTS[profile], **unpulled, **given}
    preset = given.get("preset")
    if preset is not None:
        presets = known["preset"].metadata["choices"]
        if preset not in presets:
            raise ConfigError(f"preset must be one of {', '.join(presets)}, got {preset!r}")
        # It is as strong as the place where it stands: as a flag it wins over the file, unless the
        # file is of a run with the same preset, whose settings are made by it.
        wins = "preset" in flags and file_values.get("preset") != preset
        stronger = flags if wins else {**file_values, **flags}
        chosen = of_preset(known, given, stronger)
        if cls is TrainConfig and "max_train_steps" not in stronger:
            said = {name: value for name, value in said.items() if name != "max_train_steps"}
        given = {**given, **chosen}
    if cls is TrainConfig:
        given["unsaid"] = tuple(name for name in known if name not in said)
    return cls(**{name: list(v) if isinstance(v, tuple) else v for name, v in given.items()})


def of_preset(known: dict[str, dataclasses.Field], given: dict, stronger: dict) -> dict:
    """What --preset fast sets, which trades a little quality for time: docs/performance.md.

    Half the steps need twice the rates; whoever names the number of steps keeps the rates as well.

    Args:
      given: all settings without the preset.
      stronger: those that win over it.
    """
    marks = {name: spec.metadata["fast"] for name, spec in known.items()}
    chosen = {n: v for n, v in marks.items() if v is not None and n not in stronger}
    if not is_guided(given.get("guidance_scale", math.inf)):  # then there is no guidance to confine
        chosen.pop("guidance_interval", None)
    for name, spec in known.items():
        factor, value = spec.metadata["fast_times"], given.get(name, spec.default)
        if factor is None or value is None or not {name, "max_train_steps"}.isdisjoint(stronger):
            continue
        chosen[name] = max(1, int(value * factor)) if factor < 1 else value * factor
    return chosen


def resolve(cfg: TrainConfig, fixed: dict | None) -> TrainConfig:
    """The settings of a run, once it is known whether there is a shared ID-Enhancer.

    `build` gives every setting its value without one. With one, those that neither a file nor a
    flag has given become what `ENHANCER_DEFAULTS` and the preset say there.

    Args:
      fixed: settings that the shared ID-Enhancer decides; None if there is none.

    Raises:
      ConfigError: a setting is given that nothing would read, or that is decided otherwise.
    """
    if fixed is None:
        return dataclasses.replace(cfg, enhancer="none")
    values = {**ENHANCER_DEFAULTS, **ENHANCER_PRESETS.get(cfg.preset, {}), **fixed}
    if {values["token_basis"], cfg.token_basis or "names"} == {"names"}:
        own = {"regulariser", "reg_weight"} <= set(cfg.unsaid)
        values |= {k: v for k, v in BASIS_DEFAULTS.items() if own or k == "learning_rate"}
    values = {name: value for name, value in values.items() if name in cfg.unsaid}
    if cfg.kv == "none" and "train_parts" in values:
        values["train_parts"] = "tokens,enhanced"
    parts = values.get("train_parts", cfg.train_parts)
    without = "leave it out, or train without the shared ID-Enhancer: --enhancer none"
    for name in NOT_WITH_ENHANCER:
        if name not in cfg.unsaid and getattr(cfg, name) is not None:
            raise ConfigError(
                f"--{name} has no effect where a shared ID-Enhancer says how a person begins; "
                f"{without}"
            )
    for name, value in fixed.items():
        if name not in cfg.unsaid and getattr(cfg, name) != value:
            raise ConfigError(
                f"--{name} is {getattr(cfg, name)}, and the shared ID-Enhancer is for {value}; "
                f"{without}"
            )
    for part, names in PARTS.items():
        if part in parts.split(","):
            continue
        for name in names:
            if name not in cfg.unsaid and getattr(cfg, name) not in (None, "none"):
                raise ConfigError(f"--{name} has no effect without {part} in --train_parts {parts}")
            values[name] = "none" if name == "kv" else None
    if "kv" in parts.split(",") and cfg.kv == "none":
        raise ConfigError("--kv none contradicts --train_parts with kv; leave one of them out")
    return dataclasses.replace(cfg, **values)


def without_switches(known: dict[str, dataclasses.Field], values: dict) -> dict:
    """The settings of one source, with each on-off flag replaced by the setting that it means.

    Raises:
      ConfigError: the source has both, and they differ; or the flag is neither on nor off.
    """
    values = dict(values)
    for name, spec in known.items():
        switch, on, off = spec.metadata["switch"] or (None, None, None)
        if switch not in values:
            continue
        value = values.pop(switch)
        if not isinstance(value, bool):
            raise ConfigError(f"{switch} must be bool, got {value!r}")
        meant = on if value else off
        if values.setdefault(name, meant) != meant:
            raise ConfigError(
                f"{switch} {str(value).lower()} means {name} {meant}, which contradicts {name} "
                f"{values[name]}; give one of them"
            )
    return values


def plain_type(annotation: Any) -> tuple[type, bool]:
    """Returns (element type, is it a list) of a field's annotation."""
    options = (
        typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    )
    (kind,) = [option for option in options if option is not types.NoneType]
    if typing.get_origin(kind) is list:
        return typing.get_args(kind)[0], True
    return kind, False


def check_type(spec: dataclasses.Field, value: Any, source: str | None) -> None:
    """Raises ConfigError unless a YAML value has the type of its field."""
    kind, is_list = plain_type(spec.type)
    optional = isinstance(spec.type, types.UnionType)
    values = value if is_list and isinstance(value, list) else [value]
    accepted = (int, float) if kind is float else (kind,)
    fits = all(
        isinstance(v, accepted) and (kind is bool or v is not True and v is not False)
        for v in values
    ) and (isinstance(value, list) == is_list)
    if not (fits or (optional and value is None)):
        expected = f"a list of {kind.__name__}" if is_list else kind.__name__
        hint = ""
        if kind is float and isinstance(value, str):
            hint = " (YAML reads 1e-4 as text; write 1.0e-4)"
        elif kind is str and isinstance(value, int | float):
            hint = " (quote it)"
        raise ConfigError(f"{spec.name} in {source} must be {expected}, got {value!r}{hint}")
    choices = spec.metadata["choices"]
    if choices and value is not None and value not in choices:
        raise ConfigError(
            f"{spec.name} in {source} must be one of {', '.join(choices)}, got {value!r}"
        )


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but a repeated key is an error (PyYAML keeps the last one)."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
        if repeated:
            raise ConfigError(f"{node.start_mark.name}: repeated key {', '.join(repeated)}")
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict:
    """Reads a YAML file of settings.

    Raises:
      ConfigError: the file cannot be read, is not YAML, repeats a key or is not a mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, StrictLoader)
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `key: value` lines, got {type(values).__name__}")
    return values


def to_yaml(config: Any) -> str:
    """The resolved settings as YAML that `--config` reads back to the same run."""
    named = {spec.name: getattr(config, spec.name) for spec in settings_of(type(config))}
    values = {n: value for n, value in named.items() if value is not None and n not in SECRETS}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
